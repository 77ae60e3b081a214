"""Thinking step by step: one thought, and one block of a persistent stream as decoding runs it.

Private thoughts are made here, and gradients flow through the whole chain; persistent streams are trained and scored in
`model/serial.py`.
"""

import jax
import jax.numpy as jnp

from thinking_lm.model.decoder import DTYPES, Cache, Decoder, Seen
from thinking_lm.thoughts import halting, report, topology
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.thoughts.tokens import fold
from thinking_lm.types import Thoughts


def think(
  decoder: Decoder,
  config: ThoughtConfig,
  hidden_BPD,
  positions_BPJ,
  keys_BP,
  past: Seen | None,
  own: Seen | None,
  wanted_BP=None,
  run=None,
  memory=None,
  make=None,
):
  """Emits one thought in each of P streams, one slot after the other.

  Args:
    hidden_BPD: hidden state of each anchor.
    past: keys that all streams share, mask [B, P or 1, 1, S].
    own: keys of each stream, of which the last J slots are free for the thought; mask [B, P, 1, W - J] of the others.
    wanted_BP: bool, for decoding: steps are run until each of these thoughts has ended. None: all n steps are run,
      which gradients can flow through.
    run, memory: another way to run slot j: (x_BPD, j, memory) -> (hidden_BPD, memory), in place of `positions_BPJ`,
      `past` and `own`.
    make: another way to make think token i: (hidden_BPD, keys_BP, i, progress, memory) -> (x_BPD, token_BP, memory).

  Returns:
    (hidden_BPJD of the think slots, Thoughts [B, P, ...], own cache, or the memory, with the thought in it).
  """
  J, n = config.slots, config.length
  if run is None:
    run, memory = cached(decoder, J, hidden_BPD.shape[:2], positions_BPJ, past, own), own.cache
  if make is None:
    make = lambda hidden, keys, i, progress, memory: (*emit(decoder, config, hidden, keys, i, progress), memory)

  def control(row, j, cache):
    return run(decoder.embed(jnp.full(hidden_BPD.shape[:2], row)), j, cache)

  def step(carry, i):
    hidden, cache, progress = carry
    x, token, cache = make(hidden, fold(keys_BP, i), i, progress, cache)
    progress = halting.drawn(decoder, config, progress, token, i)
    hidden, cache = run(x, i + config.opening, cache)
    progress = halting.reached(decoder, config, progress, hidden, i + 1)
    return (hidden, cache, progress), (hidden, x, token)

  hidden, cache, around = hidden_BPD, memory, ([], [])
  progress = halting.begin(decoder, config, hidden, keys_BP)
  if config.delimiters:
    hidden, cache = control(decoder.start, 0, cache)
    around[0].append(hidden[:, :, None])
  wanted_BP = wanted_BP if config.may_end else None
  (hidden, cache, progress), made = _steps(step, (hidden, cache, progress), n, decoder.stop, wanted_BP)
  states, inputs, tokens = made
  if config.closing:
    hidden, cache = control(decoder.stop, J - 1, cache)
    around[1].append(hidden[:, :, None])
  states, inputs, tokens = (jnp.moveaxis(a, 0, 2) for a in (states, inputs, tokens))
  thoughts = Thoughts(inputs, tokens, progress.used_X)
  return jnp.concatenate([*around[0], states, *around[1]], axis=2), thoughts, cache


def cached(decoder, J: int, edge, positions_BPJ, past: Seen | None, own: Seen):
  """How a slot is run against a cache of each stream's own keys, whose last J slots are filled one by one.

  Args:
    edge: (B, P). own: with mask [B, P, 1, W - J] of the slots before them.

  Returns:
    (x_BPD, j, cache) -> (hidden_BPD, cache with slot j of them).
  """
  first = own.cache.k.shape[-3] - J
  before = jnp.broadcast_to(own.mask_BPQS, (*edge, 1, first))

  def slot(x_BPD, j, cache):
    done = jnp.broadcast_to(jnp.arange(J) < j, (*before.shape[:3], J))
    seen = Seen(cache, jnp.concatenate([before, done], axis=-1))
    position = jax.lax.dynamic_slice_in_dim(positions_BPJ, j, 1, axis=2)
    hidden, new = decoder(x_BPD[:, :, None], position, jnp.ones((1, 1, 1, 1), bool), past, seen)
    cache = jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, first + j, axis=3), cache, new)
    return hidden[:, :, 0], cache

  return slot


def emit(decoder, config, hidden_XD, keys_X, i, progress):
  """(input_XD, token_X) of think token i."""
  if config.report:
    return report.say(decoder, hidden_XD, keys_X, config, i, progress.first_X)
  return config.kind_of.step(decoder, hidden_XD, keys_X, config)


def _steps(step, carry, n, stop, wanted_BP):
  """Scans `step` over 0 ... n - 1; with `wanted_BP` only until all these have ended (the rest reads `stop`)."""
  if wanted_BP is None:
    return jax.lax.scan(step, carry, jnp.arange(n))
  shapes = jax.eval_shape(lambda carry: step(carry, 0)[1], carry)
  states, inputs, tokens = (jnp.zeros((n, *a.shape), a.dtype) for a in shapes)

  def going(loop):
    i, (_, _, progress), _ = loop
    return (i < n) & jnp.any(wanted_BP & progress.going_X)

  def body(loop):
    i, carry, made = loop
    carry, new = step(carry, i)
    return i + 1, carry, jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, i, axis=0), made, new)

  start = (jnp.zeros((), jnp.int32), carry, (states, inputs, jnp.full_like(tokens, stop)))
  return jax.lax.while_loop(going, body, start)[1:]


def block(decoder: Decoder, config, past: Seen, x_BCD, segments_BW, positions_BW, keys_B, wanted_B):
  """One block of a persistent stream: C real tokens at once, then the J slots of a thought one by one.

  Args:
    past: the cache of earlier blocks, mask [B, 1, W, S]. It is read and never changed.
    x_BCD: inputs of the real slots. segments_BW, positions_BW: documents (0 for empty slots) and rotary positions.
    keys_B: random keys of the thought, or None.
    wanted_B: bool, who thinks. When nobody does, the think slots are zeros, and a thought ends when all who think have.

  Returns:
    (own cache [L, B, 1, W, K, E], hidden_BWD, Thoughts [B, ...]).
  """
  C, J, W = x_BCD.shape[1], config.slots, segments_BW.shape[1]
  mask = topology.sees(segments_BW, segments_BW, jnp.arange(W), jnp.arange(W))
  real_B1CD, new = decoder(
    x_BCD[:, None], positions_BW[:, None, :C], mask[:, :, :C, :C], Seen(past.cache, past.mask_BPQS[:, :, :C])
  )
  own = jax.tree.map(lambda a: jnp.pad(a, [(0, 0)] * 3 + [(0, J), (0, 0), (0, 0)]), new)
  # Padding may stand between documents: the last real slot is found by its place and not by counting.
  last_B = jnp.max(jnp.where(segments_BW[:, :C] > 0, jnp.arange(C), 0), axis=1)
  anchor_B1D = jnp.take_along_axis(real_B1CD[:, 0], last_B[:, None, None], axis=1)

  def thinking(own):
    seen = Seen(past.cache, past.mask_BPQS[:, :, -1:])
    keys_B1 = None if keys_B is None else keys_B[:, None]
    own = Seen(own, mask[:, :, -1:, :C])
    positions_B1J = positions_BW[:, None, C:]
    hidden, thoughts, own = think(
      decoder, config, anchor_B1D, positions_B1J, keys_B1, seen, own, wanted_BP=wanted_B[:, None]
    )
    return own, jnp.concatenate([real_B1CD, hidden], axis=2)[:, 0], jax.tree.map(lambda a: a[:, 0], thoughts)

  shapes = jax.eval_shape(thinking, own)
  skipped = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

  def skipping(own):
    return own, skipped[1].at[:, :C].set(real_B1CD[:, 0]), *skipped[2:]

  return jax.lax.cond(jnp.any(wanted_B), thinking, skipping, own)


def empty_cache(decoder: Decoder, *slots: int) -> Cache:
  """A cache [L, *slots, K, E] that nothing has been written to."""
  c = decoder.config
  shape = (c.layers, *slots, c.resolved_kv_heads, c.resolved_head_width)
  return Cache(*(jnp.zeros(shape, DTYPES[c.compute_dtype]) for _ in range(2)))


def write(cache: Cache, own: Cache, start) -> Cache:
  """The cache with a block's keys and values [L, B, 1, W, K, E] at slots start ... start + W - 1."""
  return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b[:, :, 0], start, axis=2), cache, own)
