"""WHICH keys a slot may see, and where it stands: index arithmetic only, no parameters.

`persistent`: one causal stream of real and think slots; a thought stays in the context of everything after it in its
document. `private`: a thought sees the real tokens up to its anchor and itself, its own look-ahead sees both, and
nothing else ever does.

Rotary positions: with `advance`, thoughts take positions of their own (a private thought continues from its anchor, a
persistent one also moves the real tokens after it); with `anchor`, think slots share their anchor's position and real
tokens keep theirs (PonderLM-2, arXiv:2509.23184).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from thinking_lm.types import Batch, Layout

TOPOLOGIES = ("persistent", "private")
ROTARY = ("advance", "anchor")


class Stream(NamedTuple):
  """The persistent stream of a batch: blocks of real slots, each followed by J think slots (see Layout).

  token_BS: index into T of the real token at a slot; T where there is none. anchor_BS, anchor_BT: index into N of the
  thought that a think slot belongs to, or that follows a real token; N where there is none. step_S: think step
  0 ... J - 1 of a slot, -1 for real slots. segments_BS: document of a slot, 0 where the slot is empty. positions_BS:
  rotary positions. slot_BT: slot of each real token. thought_BN: first slot of each thought (S where invalid).
  readout_BT: slot that predicts each target; as of `end`, once it is known where the thoughts end.
  """

  token_BS: jax.Array
  anchor_BS: jax.Array
  anchor_BT: jax.Array
  step_S: jax.Array
  segments_BS: jax.Array
  positions_BS: jax.Array
  slot_BT: jax.Array
  thought_BN: jax.Array
  readout_BT: jax.Array


def take(values_BT, index_BX, fill):
  """values_BT[b, index_BX[b, x]], `fill` where the index is out of range."""
  padded = jnp.concatenate([values_BT, jnp.full_like(values_BT[:, :1], fill)], axis=1)
  T = values_BT.shape[1]
  return jnp.take_along_axis(padded, jnp.where((index_BX >= 0) & (index_BX < T), index_BX, T), axis=1)


def scatter(shape, fill, index_BX, values_BX):
  """An array of `shape` [B, S] that is `fill` but for values_BX at index_BX; indices out of range are dropped."""
  put = jax.vmap(lambda row_S, index_X, values_X: row_S.at[index_X].set(values_X, mode="drop"))
  return put(jnp.full(shape, fill, jnp.int32), index_BX, values_BX)


def persistent(batch: Batch, layout: Layout, J: int, rotary: str) -> Stream:
  """Lays real tokens and thoughts out as one stream."""
  B, T = batch.tokens_BT.shape
  N, C, (sizes, tail) = layout.anchors_BN.shape[1], layout.block, layout.sizes(T)
  S = sum(sizes) + len(sizes) * J + tail
  index_T = jnp.arange(T)
  order_BN = jnp.broadcast_to(jnp.arange(N), (B, N))
  anchor_of_BT = scatter((B, T), N, layout.anchors_BN, order_BN)
  ends_BT = anchor_of_BT < N

  if layout.cuts is None:
    last_BT = jax.lax.cummax(jnp.where(ends_BT, index_T, -1), axis=1)
    since_BT = index_T - 1 - jnp.pad(last_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    block_BT = jnp.cumsum(since_BT % C == 0, axis=1) - 1
    slot_BT = block_BT * (C + J) + since_BT % C
    thought_BN = take(block_BT * (C + J) + C, layout.anchors_BN, S)
  else:
    slot_T = index_T + J * jnp.searchsorted(jnp.array(layout.cuts, jnp.int32), index_T, side="right")
    slot_BT = jnp.broadcast_to(slot_T, (B, T))
    thought_BN = take(slot_BT + 1, layout.anchors_BN, S)
  think_BX = (thought_BN[:, :, None] + jnp.arange(J)).reshape(B, N * J)

  token_BS = scatter((B, S), T, slot_BT, jnp.broadcast_to(index_T, (B, T)))
  anchor_BS = scatter((B, S), N, think_BX, jnp.repeat(order_BN, J, axis=1))
  each = [np.concatenate([np.full(size, -1), np.arange(J)]) for size in sizes]
  step_S = jnp.array(np.concatenate([*each, np.full(tail, -1)]), jnp.int32)
  home_BS = jnp.where(step_S < 0, token_BS, take(layout.anchors_BN, anchor_BS, T))
  positions_BT = batch.positions_BT
  if rotary == "advance":
    before_BT = jnp.cumsum(ends_BT, axis=1) - ends_BT
    first_BT = jnp.take_along_axis(before_BT, jnp.maximum(index_T - positions_BT, 0), axis=1)
    positions_BT = positions_BT + J * (before_BT - first_BT)
  positions_BS = take(positions_BT, home_BS, 0) + (rotary == "advance") * (step_S + 1)
  segments_BS = take(batch.segments_BT, home_BS, 0)
  return Stream(token_BS, anchor_BS, anchor_of_BT, step_S, segments_BS, positions_BS, slot_BT, thought_BN, slot_BT)


def end(stream: Stream, last_BN) -> Stream:
  """The stream whose thoughts end at slot `last_BN` of theirs: nothing sees what is behind, targets read out there.

  -1 is a thought without a slot, whose target reads out at the anchor.
  """
  S = stream.token_BS.shape[1]
  over_BS = stream.step_S > take(last_BN, stream.anchor_BS, S)
  end_BT = take(last_BN, stream.anchor_BT, -1)
  readout_BT = jnp.where(end_BT < 0, stream.slot_BT, take(stream.thought_BN, stream.anchor_BT, S) + end_BT)
  return stream._replace(segments_BS=jnp.where(over_BS, 0, stream.segments_BS), readout_BT=readout_BT)


def sees(segments_BQ, segments_BS, slot_Q, slot_S):
  """mask_B1QS for a stream: a query sees the slots of its document up to its own; empty slots are never seen."""
  same_BQS = (segments_BQ[:, :, None] == segments_BS[:, None, :]) & (segments_BS[:, None, :] > 0)
  return (same_BQS & (slot_S[None, :] <= slot_Q[:, None]))[:, None]


class Private(NamedTuple):
  """Private thoughts of a batch: one for every anchor, each with J think slots and A look-ahead tokens.

  prefix_BNT: bool, the real tokens that the thought and its look-ahead see. valid_BN: the anchor exists.
  positions_BNX: rotary positions of the X = J + A slots, and of those of an answer, which stand where the look-ahead
  does. ahead_BNA: index into T of the look-ahead tokens (anchor + 1 ...), T where they leave the anchor's document.
  target_BNM: index into T of the M = A + 1 targets.
  """

  prefix_BNT: jax.Array
  valid_BN: jax.Array
  positions_BNX: jax.Array
  ahead_BNA: jax.Array
  target_BNM: jax.Array


def private(batch: Batch, layout: Layout, J: int, lookahead: int, rotary: str, answer: int = 0) -> Private:
  """Lays the thoughts of all anchors out side by side; answer: tokens of an answer, the last of which has no slot."""
  T = batch.tokens_BT.shape[1]
  anchors_BN = layout.anchors_BN
  segment_BN = take(batch.segments_BT, anchors_BN, 0)
  position_BN = take(batch.positions_BT, anchors_BN, 0)
  index_T = jnp.arange(T)
  prefix_BNT = (index_T <= anchors_BN[..., None]) & (batch.segments_BT[:, None] == segment_BN[..., None])
  step_J, after_X = jnp.arange(J) + 1, jnp.concatenate([jnp.arange(1, lookahead), jnp.arange(1, answer)])
  if rotary == "advance":
    offset_X = jnp.concatenate([step_J, J + after_X])
  else:
    offset_X = jnp.concatenate([jnp.zeros_like(step_J), after_X])
  target_BNM = window(batch, layout, lookahead)
  return Private(prefix_BNT, anchors_BN < T, position_BN[..., None] + offset_X, target_BNM[:, :, 1:], target_BNM)


def window(batch: Batch, layout: Layout, lookahead: int):
  """target_BNM: indices anchor, anchor + 1 ... anchor + M - 1 into T; T where they leave the anchor's document."""
  B, T = batch.tokens_BT.shape
  N = layout.anchors_BN.shape[1]
  index_BNM = layout.anchors_BN[..., None] + jnp.arange(lookahead)
  segment_BNM = take(batch.segments_BT, index_BNM.reshape(B, -1), 0).reshape(B, N, lookahead)
  inside_BNM = (segment_BNM == take(batch.segments_BT, layout.anchors_BN, 0)[..., None]) & (segment_BNM > 0)
  return jnp.where(inside_BNM, index_BNM, T)


def rest(batch: Batch, layout: Layout, lookahead: int):
  """inside_BNT: the targets that count for a thought: `lookahead` of them from its anchor on, 0 for the whole rest."""
  T = batch.tokens_BT.shape[1]
  ahead_BNT = jnp.arange(T) - layout.anchors_BN[..., None]
  same_BNT = batch.segments_BT[:, None] == take(batch.segments_BT, layout.anchors_BN, 0)[..., None]
  return (ahead_BNT >= 0) & (ahead_BNT < (lookahead or T)) & same_BNT


def documents(batch: Batch, layout: Layout):
  """(unit_BN, unit_BT) of persistent thoughts, as in Trace: whose outcome a document's thoughts and targets share."""
  B, N = layout.anchors_BN.shape
  segment_BN = take(batch.segments_BT, layout.anchors_BN, 0)
  same_BNN = segment_BN[:, :, None] == segment_BN[:, None, :]
  unit_BN = jnp.argmax(same_BNN, axis=-1) if N else jnp.zeros((B, 0), jnp.int32)
  first_BNT = jnp.where(rest(batch, layout, 0), jnp.arange(N)[:, None], N)  # anchors ascend: the first one is the unit
  return unit_BN, jnp.min(first_BNT, axis=1, initial=N)
