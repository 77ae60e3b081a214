"""The serial persistent stream: thoughts that are made one token after another, and stay in the context.

The stream is cut into segments, each with a cache of exactly its size and with a backward pass of its own
(`model/reverse.py`); what flows between segments is plain autodiff.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from thinking_lm.model.decoder import Cache, Decoder
from thinking_lm.model.reverse import segment
from thinking_lm.model.segment import ROWS, Facts, Shape, Spec, State, stacked
from thinking_lm.sharding import constrain
from thinking_lm.thoughts import halting, topology
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Layout, Thoughts

SEGMENTS = 4
"""Most segments that blocks of one size are cut into."""

SEGMENT_SLOTS = 32
"""Fewest slots of a segment that is cut off for its size alone."""


def segments(config: ThoughtConfig, sizes: tuple[int, ...], tail: int) -> list[Shape]:
  """The segments of a stream whose blocks have so many real slots, and `tail` ones after the last thought.

  A last segment of one round without a thought takes the end of the last thought, and the tail.
  """
  lead, found = 1 + config.closing, []
  total = sum(sizes) + len(sizes) * config.slots
  start = 0
  while start < len(sizes):
    run = next((i for i in range(start, len(sizes)) if sizes[i] != sizes[start]), len(sizes)) - start
    slots = max(SEGMENT_SLOTS, -(-total // SEGMENTS))
    pieces = min(run, -(-run * (sizes[start] + config.slots) // slots))
    for piece in range(pieces):
      share = run * (piece + 1) // pieces - run * piece // pieces
      found.append(Shape(share, lead, sizes[start], config.opening, config.length - 1))
    start += run
  return [*found, Shape(1, lead, tail, 0, 0)]


def stream_serial(
  decoder: Decoder, config: ThoughtConfig, stream: topology.Stream, x_BSD, keys_BN, layout: Layout, taps_BNnD=None
):
  """Thinks along a stream.

  Args:
    x_BSD: inputs of the real slots; whatever elsewhere.
    keys_BN: random keys of the thoughts; None for kinds that draw nothing.
    taps_BNnD: zeros, whose gradient is that of the input of each think token.

  Returns:
    (hidden_BSD, Thoughts [B, N, ...], the stream with the ends of its thoughts, the cache).
  """
  (B, S, D), J, n = x_BSD.shape, config.slots, config.length
  sizes, tail = layout.sizes(stream.slot_BT.shape[1])
  plan = segments(config, sizes, tail)
  lead = plan[0].lead
  graph, params = nnx.split(decoder)
  params = nnx.to_pure_dict(params)
  temperature = None
  if isinstance(config.temperature, jax.Array):  # a spec is static
    temperature, config = config.temperature, dataclasses.replace(config, temperature=1.0)
  if config.opening:
    x_BSD = jnp.where((stream.step_S == 0)[:, None], decoder.embed_row(decoder.start, B, S), x_BSD)
  if config.closing:
    x_BSD = jnp.where((stream.step_S == J - 1)[:, None], decoder.embed_row(decoder.stop, B, S), x_BSD)
  step_S = stream.step_S - config.opening
  taps_BSD = _taps(stream, step_S, taps_BNnD).astype(x_BSD.dtype)
  x_BSD = jnp.where(((step_S >= 0) & (step_S < n))[:, None], taps_BSD, x_BSD)
  ahead = lambda a: jnp.pad(a, ((0, 0), (lead, 0), *[(0, 0)] * (a.ndim - 2)))
  x_BSD, segments_BS, positions_BS = map(ahead, (x_BSD, stream.segments_BS, stream.positions_BS))
  x_BSD = constrain(x_BSD, *ROWS)
  keys_RB = _round_keys(stream, keys_BN, sizes, J)

  nothing_BD = jnp.zeros((B, D), x_BSD.dtype)
  state = State(nothing_BD, halting.begin(decoder, config, nothing_BD, None))
  past, made, start, block = [], [], 0, 0
  for shape in plan:
    stop, blocks = start + shape.slots, slice(block, block + shape.rounds)
    keys = [None if keys is None else keys[blocks] for keys in keys_RB]
    facts = Facts(positions_BS[:, start:stop], segments_BS[:, :stop], *keys, temperature)
    spec = Spec(graph, config, shape)
    one, cache, state = segment(spec, params, x_BSD[:, start:stop], facts, state, past)
    segments_BS = segments_BS.at[:, :stop].set(one.segments_BA)
    past, made, start, block = [*past, cache], [*made, one], stop, blocks.stop

  whole = lambda name: jnp.concatenate([getattr(one, name) for one in made], axis=1)[:, lead:]
  index_BNn = stream.thought_BN[..., None] + config.opening + jnp.arange(n)
  index_BX = jnp.minimum(index_BNn, S - 1).reshape(B, -1)
  inputs_BXD = jnp.take_along_axis(whole("inputs_BSD"), index_BX[..., None], axis=1)
  tokens_BX = jnp.take_along_axis(whole("tokens_BS"), index_BX, axis=1)
  used_BR = jnp.concatenate([one.used_RB for one in made])[1:].T
  block_S = jnp.repeat(jnp.arange(len(sizes)), jnp.array(sizes) + J, total_repeat_length=S)
  used_BN = jnp.take_along_axis(used_BR, block_S[jnp.minimum(stream.thought_BN, S - 1)], axis=1)
  thoughts = Thoughts(inputs_BXD.reshape(*index_BNn.shape, D), tokens_BX.reshape(index_BNn.shape), used_BN)
  return whole("hidden_BSD"), thoughts, topology.end(stream, config.last(used_BN)), _cache(past, lead)


def _taps(stream, step_S, taps_BNnD):
  """taps_BSD, each at the slot of its think token; 0 elsewhere, and everywhere where there are none."""
  if taps_BNnD is None:
    return jnp.zeros(())
  B, N, n, D = taps_BNnD.shape
  index_BS = jnp.where(stream.anchor_BS < N, stream.anchor_BS * n + step_S, N * n)
  return topology.take(taps_BNnD.reshape(B, N * n, D), index_BS[..., None], 0.0)


def _round_keys(stream, keys_BN, sizes, J):
  """Random keys of the thoughts that end and that begin in each round, each [R + 1, B]; None twice without keys."""
  if keys_BN is None:
    return None, None
  last, at = [], 0
  for size in sizes:
    at += size + J
    last.append(at - 1)
  block_BR = jnp.minimum(stream.anchor_BS[:, jnp.array(last)], keys_BN.shape[1] - 1)
  keys_RB = jnp.take_along_axis(keys_BN, block_BR, axis=1).T
  ends_RB = jnp.concatenate([keys_RB[:1], keys_RB])
  return ends_RB, jnp.concatenate([keys_RB, keys_RB[-1:]])


def _cache(past: list, lead: int) -> Cache:
  """The caches of all segments as one [L, B, S, K, E], without the empty slots in front."""
  whole = stacked(jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-2), *past))
  return jax.tree.map(lambda a: jnp.swapaxes(a, 2, 3)[:, :, lead:], whole)
