"""Other thoughts in place of a model's own: what is left of a gain when the content of the thoughts is taken away?

A control is a pure function of a Source. It gives thoughts to put back in with `rollout(..., given=...)`, and says
which of them it changed: where there is no donor, a thought stays as it is and the targets that hang on it do not count
(see `counted`). Every donor is causal. A thought that has read further than the position it is put at would tell the
targets there, so that nothing is taken from a later position of the same row, and nothing wraps around.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from thinking_lm.types import Batch, Layout, Thoughts


class Source(NamedTuple):
  """What controls are made from.

  own: the thoughts that the model had. valid_BN: bool, the anchor exists; the valid ones of a row come first.
  pause_D: embedding of the PAUSE row. before: for each anchor number, the thought of the nearest row before this batch
  that has one there, leaves [1, G, N, ...]; before_N: bool, there is such a row. (With them, who gets whose thought
  does not depend on how rows are grouped into batches.)
  """

  own: Thoughts
  valid_BN: jax.Array
  pause_D: jax.Array
  before: Thoughts
  before_N: jax.Array


def own(source: Source) -> tuple[Thoughts, jax.Array]:
  """The model's own thoughts, as they are."""
  return source.own, source.valid_BN


def pause(source: Source) -> tuple[Thoughts, jax.Array]:
  """The PAUSE embedding in place of every think token used: as much time to think, and nothing thought."""
  inputs = jnp.broadcast_to(source.pause_D, source.own.inputs_BGNJD.shape)
  own = source.own
  return own.replace(inputs_BGNJD=inputs, tokens_BGNJ=jnp.full_like(own.tokens_BGNJ, -1)), source.valid_BN


def shuffled(source: Source) -> tuple[Thoughts, jax.Array]:
  """Another sequence's thoughts: those of the nearest earlier row that thinks at the same anchor number.

  Rows of padding have no valid anchors and never give. In a packed corpus the nearest row is often an earlier part of
  the same document; what this control then still knows is an upper bound on what an unrelated sequence's would.
  """
  pool, last_XN = _pool(source)
  changed_BN = source.valid_BN & (last_XN[:-1] >= 0)
  donor_BN = jnp.where(changed_BN, last_XN[:-1], jnp.arange(1, len(last_XN))[:, None])
  return _take(pool, donor_BN), changed_BN


def moved(source: Source) -> tuple[Thoughts, jax.Array]:
  """Another position's thoughts: each anchor gets those of the anchor before it in its row; the first one has none."""
  changed_BN = source.valid_BN & (jnp.arange(source.valid_BN.shape[1]) > 0)

  def move(a):
    where = changed_BN.reshape(changed_BN.shape[0], 1, changed_BN.shape[1], *[1] * (a.ndim - 3))
    return jnp.where(where, jnp.roll(a, 1, axis=2), a)

  return jax.tree.map(move, source.own), changed_BN


CONTROLS = dict(own=own, pause=pause, shuffled=shuffled, moved=moved)
"""Name -> Source -> (Thoughts, changed_BN)."""

NONE = "none"
"""The control that puts nothing in: the same parameters with thought.length 0. It changes slots and not only thoughts,
so that it is no function of a Source."""


def latest(source: Source) -> tuple[Thoughts, jax.Array]:
  """(before, before_N) for the batch that follows."""
  pool, last_XN = _pool(source)
  return _take(pool, jnp.maximum(last_XN[-1:], 0)), last_XN[-1] >= 0


def _pool(source: Source):
  """(thoughts of `before` and of all rows of the batch, [1 + B, ...]; last_XN: for each anchor number, the nearest of
  these up to and with each, -1 where there is none).
  """
  pool = jax.tree.map(lambda a, b: jnp.concatenate([a.astype(b.dtype), b]), source.before, source.own)
  valid_XN = jnp.concatenate([source.before_N[None], source.valid_BN])
  return pool, jax.lax.cummax(jnp.where(valid_XN, jnp.arange(len(valid_XN))[:, None], -1), axis=0)


def _take(pool: Thoughts, donor_BN) -> Thoughts:
  """Thought n of row b is thought n of pool row donor_BN[b, n]."""
  G, N = pool.tokens_BGNJ.shape[1:3]
  index = (donor_BN[:, None, :], jnp.arange(G)[None, :, None], jnp.arange(N)[None, None, :])
  return jax.tree.map(lambda a: a[index], pool)


def counted(batch: Batch, layout: Layout, changed_BN, topology: str):
  """counted_BT: bool, which targets tell something about a control.

  `private`: all but those at an anchor whose thought stayed as it was. `persistent`: all but those whose last anchor
  (in their document, and not after them) kept its thought. Targets that no thought can reach count: they are the same
  under every control.
  """
  B, T = batch.tokens_BT.shape
  rows, index_T = jnp.arange(B)[:, None], jnp.arange(T)
  false_BT = jnp.zeros((B, T), bool)
  anchor_BT = false_BT.at[rows, layout.anchors_BN].set(True, mode="drop")
  changed_BT = false_BT.at[rows, layout.anchors_BN].set(changed_BN, mode="drop")
  if topology == "private":
    return changed_BT | ~anchor_BT
  last_BT = jax.lax.cummax(jnp.where(anchor_BT, index_T, -1), axis=1)
  reached_BT = last_BT >= index_T - batch.positions_BT
  return ~reached_BT | jnp.take_along_axis(changed_BT, jnp.maximum(last_BT, 0), axis=1)
