"""Decoding's cache: prompts, each shared by the streams that go on from it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from thinking_lm.model.decoder import Cache, Decoder, Seen
from thinking_lm.model.thinking import empty_cache


class Streams(NamedTuple):
  """B prompts and G streams that go on from each, every one at a place of its own.

  prompt: keys of the prompts, mask_BPQS [B, 1, 1, T]. cache: of what the streams have added, [L, B, G, S, K, E].
  """

  prompt: Seen
  cache: Cache

  @classmethod
  def begin(cls, decoder: Decoder, cache: Cache, seen_BT, G: int) -> "Streams":
    """Streams that have added nothing to prompts (cache [L, B, T, K, E]); they have no room yet."""
    return cls(Seen(cache, seen_BT[:, None, None]), empty_cache(decoder, seen_BT.shape[0], G, 0))

  def grow(self, room: int) -> "Streams":
    """The same streams with room for so many inputs in all."""
    none, more = (0, 0), (0, room - self.cache.k.shape[3])
    longer = lambda a: jnp.pad(a, (none, none, none, more, none, none))
    return self._replace(cache=jax.tree.map(longer, self.cache))

  def feed(self, decoder: Decoder, x_BGD, positions_BG, slot_BG) -> tuple[jax.Array, "Streams"]:
    """Feeds every stream one input, which sees the prompt and the slots before its own.

    Returns (hidden_BGD, the streams with it in `slot_BG`, whatever stood there).
    """
    before_BGS = jnp.arange(self.cache.k.shape[3]) < slot_BG[..., None]
    own, itself = Seen(self.cache, before_BGS[:, :, None]), jnp.ones((1, 1, 1, 1), bool)
    hidden, new = decoder(x_BGD[:, :, None], positions_BG[..., None], itself, self.prompt, own)
    # Not a scatter, which is slower on a CPU; attention reads every slot anyway, and `grow` keeps those that wait few.
    at_BGS = jnp.arange(self.cache.k.shape[3]) == slot_BG[..., None]
    cache = jax.tree.map(lambda old, new: jnp.where(at_BGS[None, ..., None, None], new, old), self.cache, new)
    return hidden[:, :, 0], self._replace(cache=cache)
