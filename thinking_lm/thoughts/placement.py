"""WHERE thoughts go: batch -> Layout, causally: whether to think after t depends on tokens <= t only.

There are no parameters: a need comes with the batch. Each rule is a pure function that marks the tokens to think after;
`place` turns the marks into a Layout of static shape. Positions and the cap are counted per document, or per piece
where a row cuts one, so that it is thought about in the same way wherever it stands in a packed row. Only `room` is a
bound of the whole row.
"""

import jax
import jax.numpy as jnp

from thinking_lm.types import Batch, Layout, Vocabulary


def none(batch: Batch, config, vocabulary: Vocabulary):
  """Nowhere."""
  del config, vocabulary
  return jnp.zeros(batch.tokens_BT.shape, bool)


def every(batch: Batch, config, vocabulary: Vocabulary):
  """After every real token."""
  del config, vocabulary
  return jnp.ones(batch.tokens_BT.shape, bool)


def stride(batch: Batch, config, vocabulary: Vocabulary):
  """After every `stride`-th token of a document."""
  del vocabulary
  return batch.positions_BT % config.stride == config.stride - 1


def sentence(batch: Batch, config, vocabulary: Vocabulary):
  """After a sentence end, by the classes of `Vocabulary.sentence_V`."""
  del config
  class_BT = jnp.asarray(vocabulary.sentence_V)[batch.tokens_BT]
  before_BT = jnp.pad(class_BT, ((0, 0), (1, 0)))[:, :-1]
  return (class_BT == 3) | ((class_BT == 2) & (before_BT == 1) & (batch.positions_BT > 0))


def explicit(batch: Batch, config, vocabulary: Vocabulary):
  """After the configured positions of each document."""
  del vocabulary
  return jnp.isin(batch.positions_BT, jnp.asarray(config.positions, jnp.int32))


def answer(batch: Batch, config, vocabulary: Vocabulary):
  """Once, before the answer: where a document's first target with a weight is predicted. A prompt ends there."""
  del config, vocabulary
  weighed_BT = batch.weights_BT > 0
  count_BT = jnp.cumsum(weighed_BT, axis=1)
  start_BT = jnp.maximum(jnp.arange(weighed_BT.shape[1]) - batch.positions_BT, 0)
  before_BT = jnp.take_along_axis(count_BT - weighed_BT, start_BT, axis=1)
  return weighed_BT & (count_BT - before_BT == 1)


def entropy(batch: Batch, config, vocabulary: Vocabulary):
  """After tokens whose need is above config.need_above: where a pass without thoughts is unsure of the next token.

  RPT (arXiv:2506.08007) keeps the tokens whose entropy under a proxy model, over its 16 most likely next tokens, is
  above a threshold; here it is over all tokens. The k neediest of a row would not be causal: whether the model thinks
  would tell how unsure it will be later. `thinking_lm.calibrate` prints which share of tokens a threshold marks.
  """
  del vocabulary
  return batch.need_BT > config.need_above


PLACEMENTS = dict(
  none=none, every=every, stride=stride, sentence=sentence, explicit=explicit, answer=answer, entropy=entropy
)

BY_NEED = ("entropy",)
"""Placements that read `Batch.need_BT`."""


def mark(batch: Batch, config, vocabulary: Vocabulary):
  """marked_BT: the tokens to think after, the first `cap` of each document that the placement names; never padding."""
  marked_BT = PLACEMENTS[config.placement](batch, config, vocabulary) & (batch.segments_BT > 0)
  if not config.cap:
    return marked_BT
  count_BT = jnp.cumsum(marked_BT, axis=1)
  start_BT = jnp.maximum(jnp.arange(marked_BT.shape[1]) - batch.positions_BT, 0)
  before_BT = jnp.take_along_axis(count_BT - marked_BT, start_BT, axis=1)
  return marked_BT & (count_BT - before_BT <= config.cap)


def markable(config, T: int, aligned: int) -> int:
  """The most tokens that `mark` can mark in a row of T tokens; `aligned` as of `place`."""
  most, cap = T, config.cap or T
  if config.placement == "stride":
    most = T // config.stride
  if config.placement == "explicit":  # a document of p + 1 tokens or more reaches its position p
    positions = sorted(set(config.positions))[:cap]
    most, cap = max(T * (i + 1) // (p + 1) for i, p in enumerate(positions)), len(positions)
  if config.placement == "answer":
    cap = 1
  documents = -(-T // aligned) if aligned else 1
  return min(most, T, cap * documents)


def capacity(config, T: int, aligned: int) -> int:
  """N, how many anchors a row of T tokens has: the most that can be marked, but no more than `room`."""
  if config.length == 0:
    return 0
  most = markable(config, T, aligned)
  return min(most, config.room or most)


def blocks(config, T: int, N: int, aligned: int) -> tuple[int, int]:
  """(C, R): R blocks of at most C real tokens hold any row, where a block ends at an anchor or when it is full.

  In general R = N + (T - 1 - N) // C + 1: N blocks end at an anchor with one token or more, the others but the last
  consume C tokens each, and the last has at least one. (Fewer anchors need no more.) With a stride k, 2k - 1 tokens
  hold the rest of one document and the first k of the next, so that T // k + 1 blocks do: a block of fewer than k
  tokens that ends at an anchor comes right after a full one. Where k divides `aligned` (see `place`), every anchor is
  the last of k tokens at a multiple of k: T / k blocks of k. That some marks are left out (`cap`, `room`) takes ends
  away and fills blocks. Of the bounds that hold, the one with the fewest slots.
  """
  k = config.stride
  if N == 0:
    return T, 1
  C = -(-T // N)
  bounds = [(C, N + (T - 1 - N) // C + 1)]
  if config.placement == "stride":
    bounds.append((k, -(-T // k)) if aligned % k == 0 else (2 * k - 1, T // k + 1))
  return min(bounds, key=lambda bound: bound[1] * (bound[0] + config.slots))


def cuts(config, T: int, N: int, aligned: int) -> tuple[int, ...] | None:
  """Layout.cuts: known where no row is thought about, or each is one document with thoughts at given positions.

  Without them, the TPU compiler takes minutes to fold where blocks without thoughts would end.
  """
  if not N:
    return ()
  if config.placement != "explicit" or aligned:
    return None
  return tuple(position + 1 for position in sorted(set(config.positions)) if position < T)[:N] or None


def place(batch: Batch, config, vocabulary: Vocabulary, aligned: int = 1) -> Layout:
  """The layout of a batch: the first N marked tokens of each row. Those that find no room are counted.

  Args:
    aligned: what the data promises: documents start at multiples of so many tokens of their row. 1 promises nothing; 0
      is one document a row, which starts at 0. The blocks are smaller where a stride divides it.
  """
  T = batch.tokens_BT.shape[1]
  N = capacity(config, T, aligned)
  marked_BT = mark(batch, config, vocabulary) if config.length else jnp.zeros(batch.tokens_BT.shape, bool)
  anchors_BN = jax.lax.sort(jnp.where(marked_BT, jnp.arange(T), T), dimension=1)[:, :N].astype(jnp.int32)
  dropped_B = None
  if config.length and markable(config, T, aligned) > N:
    dropped_B = jnp.maximum(marked_BT.sum(axis=1) - N, 0)
  C, R = blocks(config, T, N, aligned)
  return Layout(anchors_BN=anchors_BN, block=C, blocks=R, dropped_B=dropped_B, cuts=cuts(config, T, N, aligned))
