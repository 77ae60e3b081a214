"""Decoding's cache: prompts, each shared by the streams that go on from it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from thinking_lm.model.decoder import DTYPES, Cache, Decoder, Seen
from thinking_lm.sharding import constrain

BLOCK = 128
"""Slots that are read and written at a time: what there is room for beyond the last block in use costs nothing."""


class Streams(NamedTuple):
  """B prompts and G streams that go on from each, every one at a place of its own.

  prompt: keys of the prompts [L, C, B, K, T / C, E] in C blocks, mask_BPQS [B, 1, 1, T]. cache: of what the streams
  have added, [L, C, B, K, G, S / C, E].
  """

  prompt: Seen
  cache: Cache

  @classmethod
  def begin(cls, decoder: Decoder, cache: Cache, seen_BT, G: int, room: int) -> "Streams":
    """Streams that have added nothing to prompts (cache [L, B, T, K, E]), with room for so many inputs each."""
    c, (B, T) = decoder.config, seen_BT.shape
    (C, size), (blocks, width) = _blocks(T), _blocks(room)

    def cut(a_LBTKE):
      L, _, _, K, E = a_LBTKE.shape
      a_LBTKE = jnp.pad(a_LBTKE, ((0, 0), (0, 0), (0, C * size - T), (0, 0), (0, 0)))
      return a_LBTKE.reshape(L, B, C, size, K, E).transpose(0, 2, 1, 4, 3, 5)

    shape = (c.layers, blocks, B, c.resolved_kv_heads, G, width, c.resolved_head_width)
    empty = Cache(*(jnp.zeros(shape, DTYPES[c.compute_dtype]) for _ in range(2)))
    mask_BPQS = jnp.pad(seen_BT, ((0, 0), (0, C * size - T)))[:, None, None]
    prompt = Seen(_split(jax.tree.map(cut, cache)), mask_BPQS, jnp.max(jnp.where(seen_BT, jnp.arange(T) + 1, 0)))
    return cls(prompt, _split(empty))

  def feed(self, decoder: Decoder, x_BGD, positions_BG, slot_BG) -> tuple[jax.Array, "Streams"]:
    """Feeds every stream one input, which sees the prompt and the slots before its own.

    Returns (hidden_BGD, the streams with it in `slot_BG`, whatever stood there). A slot beyond the room spoils what its
    stream holds: only those that ended may have one.
    """
    _, C, *_, size, _ = self.cache.k.shape
    before_BGS = jnp.arange(C * size) < slot_BG[..., None]
    own, itself = Seen(self.cache, before_BGS[:, :, None], jnp.max(slot_BG)), jnp.ones((1, 1, 1, 1), bool)
    hidden, new = decoder(x_BGD[:, :, None], positions_BG[..., None], itself, self.prompt, own)
    return hidden[:, :, 0], self._replace(cache=_written(self.cache, new, slot_BG))


def _blocks(slots: int) -> tuple[int, int]:
  """(how many blocks, slots of each) there are for so many slots."""
  return -(-slots // BLOCK), min(slots, BLOCK)


def _split(cache: Cache) -> Cache:
  return jax.tree.map(lambda a: constrain(a, "layers", None, "batch", "kv_heads", *[None] * (a.ndim - 4)), cache)


def _written(cache: Cache, new: Cache, slot_BG) -> Cache:
  """The cache with a new slot [L, B, G, 1, K, E] of every stream: blocks that hold one are written in place.

  Not a scatter, for which the TPU's compiler copies the cache into another layout and back, every turn.
  """
  size = cache.k.shape[-2]

  def block(i, cache):
    at_BGS = jnp.arange(size) + i * size == slot_BG[..., None]
    at = at_BGS[None, None, :, None, :, :, None]

    def put(old, new):
      part = jax.lax.dynamic_slice_in_dim(old, i, 1, axis=1)
      part = jnp.where(at, jnp.moveaxis(new, 4, 2)[:, None], part)
      return jax.lax.dynamic_update_slice_in_dim(old, part, i, axis=1)

    return jax.tree.map(put, cache, new)

  return jax.lax.fori_loop(jnp.min(slot_BG) // size, jnp.max(slot_BG) // size + 1, block, cache)
