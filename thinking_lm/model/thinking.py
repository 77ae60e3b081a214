"""Thinking step by step: a private thought, with gradients through the whole chain.

Persistent streams are trained and scored in `model/serial.py`, and decoding goes its own way (`model/generate.py`).
"""

import jax
import jax.numpy as jnp

from thinking_lm.model.decoder import DTYPES, Cache, Decoder, Seen
from thinking_lm.thoughts import halting, report
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
  run=None,
  memory=None,
  make=None,
):
  """Emits one thought in each of P streams, one slot after the other.

  Args:
    hidden_BPD: hidden state of each anchor.
    past: keys that all streams share, mask [B, P or 1, 1, S].
    own: keys of each stream, of which the last J slots are free for the thought; mask [B, P, 1, W - J] of the others.
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
    return run(decoder.embed_row(row, *hidden_BPD.shape[:2]), j, cache)

  def step(carry, i):
    hidden, cache, progress = carry
    progress = halting.reached(decoder, config, progress, hidden, i)
    x, token, cache = make(hidden, fold(keys_BP, i), i, progress, cache)
    progress = halting.drawn(decoder, config, progress, token, i)
    hidden, cache = run(x, i + config.opening, cache)
    return (hidden, cache, progress), (hidden, x, token)

  hidden, cache, around = hidden_BPD, memory, ([], [])
  progress = halting.fresh(config, hidden.shape[:-1], keys_BP)
  if config.delimiters:
    hidden, cache = control(decoder.start, 0, cache)
    around[0].append(hidden[:, :, None])
  (hidden, cache, progress), made = jax.lax.scan(step, (hidden, cache, progress), jnp.arange(n))
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


def tapped(decoder, config, taps_XnD, hidden_XD, keys_X, i, progress, memory):
  """`think`'s way to make think token i, with zeros added whose gradient is that of its input."""
  x, token = emit(decoder, config, hidden_XD, keys_X, i, progress)
  return x + jax.lax.dynamic_index_in_dim(taps_XnD, i, axis=-2, keepdims=False).astype(x.dtype), token, memory


def emit(decoder, config, hidden_XD, keys_X, i, progress):
  """(input_XD, token_X) of think token i."""
  if config.report:
    return report.say(decoder, hidden_XD, keys_X, config, i, progress.first_X)
  return config.kind_of.step(decoder, hidden_XD, keys_X, config)


def empty_cache(decoder: Decoder, *slots: int) -> Cache:
  """A cache [L, *slots, K, E] that nothing has been written to."""
  c = decoder.config
  shape = (c.layers, *slots, c.resolved_kv_heads, c.resolved_head_width)
  return Cache(*(jnp.zeros(shape, DTYPES[c.compute_dtype]) for _ in range(2)))
