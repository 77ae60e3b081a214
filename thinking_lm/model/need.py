"""The need of a placement by need: next-token entropy in a pass without thoughts, in whole rows and token by token.

Thoughts never change it, whatever the topology, so that decoding thinks where training and evaluation do; a watcher
keeps a cache of real tokens of its own for that.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from thinking_lm.model.decoder import Cache, Decoder, Model, Seen
from thinking_lm.model.readout import entropy
from thinking_lm.model.thinking import empty_cache, write
from thinking_lm.thoughts import topology
from thinking_lm.types import Batch, Params


def needed(model: Model, params: Params, batch: Batch) -> Batch:
  """The batch with the need of every token, by these parameters. No gradient flows through it."""
  return batch.replace(need_BT=_look(model.bind(jax.lax.stop_gradient(params)), batch)[0])


def _look(decoder: Decoder, batch: Batch):
  """(need_BT, the cache of the real tokens)."""
  slot_T = jnp.arange(batch.tokens_BT.shape[1])
  mask = topology.sees(batch.segments_BT, batch.segments_BT, slot_T, slot_T)
  hidden, new = decoder(decoder.embed(batch.tokens_BT)[:, None], batch.positions_BT[:, None], mask)
  return entropy(decoder, hidden[:, 0]), Cache(new.k[:, :, 0], new.v[:, :, 0])


class Watched(NamedTuple):
  """Rows that a watcher has read so far: filled slots of its cache, and which of them each row has."""

  cache: Cache
  seen_BS: jax.Array


def begin(decoder: Decoder, batch: Batch, room: int) -> tuple[jax.Array, Watched]:
  """(need_BT of prompts, what decoding goes on from); room: tokens that will be added to each row."""
  need_BT, cache = _look(decoder, batch)
  more = empty_cache(decoder, batch.tokens_BT.shape[0], room)
  cache = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), cache, more)
  return need_BT, Watched(cache, jnp.pad(batch.segments_BT > 0, ((0, 0), (0, room))))


def follow(decoder: Decoder, watched: Watched, token_B, position_B, slot) -> tuple[jax.Array, Watched]:
  """(need_B after one more token of each row, the rows with it), which takes `slot` of the cache."""
  past = Seen(watched.cache, watched.seen_BS[:, None, None])
  one = jnp.ones((1, 1, 1, 1), bool)
  hidden, own = decoder(decoder.embed(token_B)[:, None, None], position_B[:, None, None], one, past)
  seen_BS = watched.seen_BS.at[:, slot].set(True)
  return entropy(decoder, hidden[:, 0, 0]), Watched(write(watched.cache, own, slot), seen_BS)
