"""The need of a placement by need: next-token entropy in a pass without thoughts, in whole rows and token by token.

Thoughts never change it, whatever the topology, so that decoding thinks where training and evaluation do; a watcher
keeps a cache of real tokens of its own for that.
"""

import jax
import jax.numpy as jnp

from thinking_lm.model.decoder import Cache, Decoder, Model
from thinking_lm.model.readout import entropy
from thinking_lm.model.streams import Streams
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


def begin(decoder: Decoder, batch: Batch, G: int, room: int) -> tuple[jax.Array, Streams]:
  """(need_BT of prompts, the G streams of each that go on from them, by as many tokens as there is room for)."""
  need_BT, cache = _look(decoder, batch)
  return need_BT, Streams.begin(decoder, cache, batch.segments_BT > 0, G, room)


def follow(decoder: Decoder, streams: Streams, token_BG, position_BG, slot_BG) -> tuple[jax.Array, Streams]:
  """(need_BG after one more token of each stream, the streams with it)."""
  hidden_BGD, streams = streams.feed(decoder, decoder.embed(token_BG), position_BG, slot_BG)
  return entropy(decoder, hidden_BGD), streams
