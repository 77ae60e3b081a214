"""Answers: m real tokens that a private thought goes on with, drawn in place of those to come, for a reward to judge.

The first is drawn where the next real token is predicted from, the others behind it, where look-ahead tokens would
stand, at the policy's temperature; so that to learn to answer is to learn to predict. An answer ends at a border, if it
draws one: what stands behind does not exist. It sees the real tokens up to its anchor and its thought, nothing else,
and nothing else sees it. Its log-probability is part of the policy.

Answers are judged as codes, bytes where tokens have any: another cut of the same bytes into tokens is the same answer
(prefix matching of RPT, arXiv:2506.08007).
"""

import jax.numpy as jnp
import numpy as np

from thinking_lm.thoughts import topology
from thinking_lm.types import BORDER, Answer, Batch, Layout, Trace, Vocabulary

SYMBOLS = 512
"""What is added to a token that has no parts, to be told from a byte and a border."""


def exists(tokens_XA, border: int | None):
  """exists_XA: no border comes before the token."""
  if border is None:
    return jnp.ones(tokens_XA.shape, bool)
  ends_XA = tokens_XA == border
  return jnp.cumsum(ends_XA, axis=-1) - ends_XA == 0


def spelled(tokens_XA, exists_XA, spelling_VW, room: int):
  """(codes_XP, the first `room` of all tokens that exist; ends_XA, how many there are up to the end of each token)."""
  size_XA = jnp.where(exists_XA, jnp.sum(spelling_VW >= 0, axis=-1)[tokens_XA], 0)
  ends_XA = jnp.cumsum(size_XA, axis=-1)
  place_P = jnp.arange(room)
  at_XP = jnp.sum(ends_XA[..., None, :] <= place_P[:, None], axis=-1)
  there_XP = at_XP < tokens_XA.shape[-1]
  pick = lambda a_XA: jnp.take_along_axis(a_XA, jnp.where(there_XP, at_XP, 0), axis=-1)
  within_XP = jnp.where(there_XP, place_P - pick(ends_XA - size_XA), 0)
  return jnp.where(there_XP, spelling_VW[pick(tokens_XA), within_XP], -1), ends_XA


def answered(trace: Trace, batch: Batch, layout: Layout, vocabulary: Vocabulary, task=None) -> Trace:
  """The trace with its answers beside what they are about; as it is where nothing was answered.

  Args:
    task: data.tasks.Task that the rows are of, if any: of a tagging task targets are labels and not next tokens, so
      that it asks for the anchor's alone.
  """
  if trace.thoughts.answer_BGNA is None:
    return trace
  tagging = task is not None and task.tagging
  return trace.replace(answer=_compared(trace.thoughts.answer_BGNA, batch, layout, vocabulary, tagging))


def _compared(answer_BGNA, batch: Batch, layout: Layout, vocabulary: Vocabulary, tagging: bool) -> Answer:
  table = vocabulary.spelling_VW
  if table is None:
    table = SYMBOLS + np.arange(vocabulary.size)[:, None]
    table[vocabulary.document] = BORDER
  spelling_VW, border, T = jnp.asarray(table, jnp.int32), vocabulary.document, batch.tokens_BT.shape[1]
  room = answer_BGNA.shape[-1] * table.shape[1] + 1
  target_BNR = topology.window(batch, layout, room)
  B, N, _ = target_BNR.shape
  tokens_BNR = topology.take(batch.targets_BT, target_BNR.reshape(B, -1), border).reshape(B, N, -1)
  came_BNP, ends_BNP = spelled(tokens_BNR, target_BNR < T, spelling_VW, room)
  first_BNP = jnp.arange(room) < ends_BNP[..., :1]
  return Answer(
    said_BGNP=spelled(answer_BGNA, exists(answer_BGNA, border), spelling_VW, room)[0],
    came_BNP=came_BNP,
    ends_BNP=ends_BNP,
    asked_BNP=jnp.where(first_BNP, came_BNP, -1) if tagging else came_BNP,
    weight_BN=topology.take(batch.weights_BT, layout.anchors_BN, 0.0),
  )
