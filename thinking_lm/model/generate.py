"""Cached decoding: every stream goes its own way, one slot a turn.

A turn feeds each stream its next slot, be it a real token or a slot of a thought; its hidden state then makes the think
token that comes next, or draws the next real token. A thought that ends early frees its stream at once, so that nobody
waits for a neighbour who thinks longer: there are as many turns as the stream with the most slots has.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from thinking_lm.model import need
from thinking_lm.model.attention import MASKED
from thinking_lm.model.decoder import Cache, Decoder, Model
from thinking_lm.model.readout import predict
from thinking_lm.model.segment import whole
from thinking_lm.model.serial import stream_serial
from thinking_lm.model.streams import Streams
from thinking_lm.model.thinking import emit
from thinking_lm.thoughts import halting, topology
from thinking_lm.thoughts.placement import PLACEMENTS, place
from thinking_lm.thoughts.tokens import categorical, draw, fold
from thinking_lm.types import Batch, Params, Vocabulary


class Sampling(NamedTuple):
  """How real tokens are drawn. temperature 0 takes the most likely token; top_k 0 keeps all tokens.

  samples: G continuations of every prompt, which share its keys unless each draws thoughts of its own in it.
  """

  max_tokens: int
  temperature: float = 1.0
  top_k: int = 0
  samples: int = 1


@struct.dataclass
class Generation:
  """Continuations, X = max_tokens; row b G + g is the g-th of prompt b. (B G is called B below.)

  tokens_BX: int32; the document id from the end of a continuation on. logp_BX: float32 log p(token) of the model
  itself (temperature 1, no top_k). length_B: tokens before the end. thought_BX: bool, a thought precedes the token.
  thoughts_BXn: int32 tokens of that thought: drawn or most likely ones; for latent and pause thoughts the real token
  that the head reads off each think slot.
  """

  tokens_BX: jax.Array
  logp_BX: jax.Array
  length_B: jax.Array
  thought_BX: jax.Array
  thoughts_BXn: jax.Array


class _Now(NamedTuple):
  """Where each stream stands, axes [B, G, ...], and what it has said.

  streams: the keys of what was fed. x: the next input, which goes to `slot`. step: which slot of a thought that is, -1
  for a real token. token, before: the two newest real tokens; `position`, `rotary` and `base` (the hidden state) are of
  the newest, and `thinks`: a thought follows it, with `progress` and, to show, the tokens `made`. thoughts: begun so
  far. count: real tokens drawn. watched: what the need of a placement is read off.
  """

  streams: Streams
  x_BGD: jax.Array
  slot_BG: jax.Array
  step_BG: jax.Array
  token_BG: jax.Array
  before_BG: jax.Array
  position_BG: jax.Array
  rotary_BG: jax.Array
  base_BGD: jax.Array
  thinks_BG: jax.Array
  thoughts_BG: jax.Array
  progress: halting.Progress
  made_BGn: jax.Array
  count_BG: jax.Array
  done_BG: jax.Array
  watched: Streams | None
  out: Generation


class _Keys(NamedTuple):
  """Random keys of each stream."""

  thoughts_BG: jax.Array
  tokens_BG: jax.Array


def generate(
  model: Model,
  config,
  params: Params,
  prompts: Batch,
  vocabulary: Vocabulary,
  key,
  sampling: Sampling,
  watcher: tuple[Model, Params] | None = None,
) -> Generation:
  """Continues each prompt until its document ends or max_tokens are drawn.

  Args:
    config: a ThoughtConfig; its samples, look-ahead, rescoring and `room` (a bound of packed rows) play no part.
    prompts: rows of one document each from position 0, padded on the right (segment 0); at least one token a row.
    key: together with `prompts.ids_B` it decides what is drawn, for thoughts and real tokens alike.
    watcher: whose need a placement by need goes by; None: the model itself, in a pass of its own without thoughts.
  """
  decoder = model.bind(params)
  watcher = (watcher[0].bind(watcher[1]) if watcher else decoder) if config.by_need else None
  keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, prompts.ids_B)
  keys_BG = jnp.stack([fold(keys_B, g) for g in range(sampling.samples)], axis=1)
  if config.random and config.topology == "persistent":  # thoughts are drawn in the prompts too
    prompts = jax.tree.map(lambda a: jnp.repeat(a, sampling.samples, axis=0), prompts)
    keys_BG = keys_BG.reshape(-1, 1)
  keys = _Keys(fold(keys_BG, 0), fold(keys_BG, 1))
  turn = functools.partial(_turn, whole(decoder), config, vocabulary, sampling, watcher and whole(watcher), keys)
  now = _prefill(decoder, config, prompts, vocabulary, fold(keys_BG[:, 0], 2), keys_BG.shape[1], sampling, watcher)
  now = jax.lax.while_loop(lambda now: ~jnp.all(now.done_BG), turn, now)
  return jax.tree.map(lambda a: a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]), now.out)


def _room(config, X: int) -> int:
  """Slots for X tokens with all their thoughts; of private ones, that of one token is there at a time."""
  return X * (1 + config.slots) if config.topology == "persistent" else X + config.slots


def _turn(decoder, config, vocabulary, sampling, watcher, keys: _Keys, now: _Now) -> _Now:
  """Feeds the next slot of every stream, and decides what comes after it."""
  n, real_BG = config.length, now.step_BG < 0
  advance = config.rotary == "advance"
  positions_BG = now.rotary_BG + (now.step_BG + 1) * advance
  slot_BG = jnp.where(now.done_BG, jnp.max(now.slot_BG, where=~now.done_BG, initial=0), now.slot_BG)
  hidden_BGD, streams = now.streams.feed(decoder, now.x_BGD, positions_BG, slot_BG)
  base_BGD = jnp.where(real_BG[..., None], hidden_BGD, now.base_BGD)
  marked_BG, watched = _marked(config, vocabulary, now, watcher)
  thinks_BG = jnp.where(real_BG, marked_BG, now.thinks_BG)

  keys_BG = fold(keys.thoughts_BG, now.count_BG) if config.random else None
  step_BG = now.step_BG + 1
  i_BG = step_BG - config.opening  # the think token that may come next
  progress, made_BGn = _reached(decoder, config, now, hidden_BGD, keys_BG, i_BG)
  opens_BG = thinks_BG & (i_BG < 0)
  makes_BG = thinks_BG & (i_BG >= 0) & (i_BG < n) & progress.going_X
  closes_BG = thinks_BG & (i_BG == n) & (progress.used_X == n) & bool(config.closing)
  speaks_BG = ~(opens_BG | makes_BG | closes_BG)

  x_BGD = jnp.where(opens_BG[..., None], decoder.embed_row(decoder.start), decoder.embed_row(decoder.stop))
  if n:
    made = (x_BGD, progress, made_BGn)
    make = functools.partial(_make, decoder, config, hidden_BGD, keys_BG, i_BG, makes_BG)
    x_BGD, progress, made_BGn = jax.lax.cond(jnp.any(makes_BG & ~now.done_BG), make, lambda *made: made, *made)

  def speak(x_BGD):
    logits_BGV = predict(decoder, config, base_BGD, hidden_BGD)
    token_BG, logp_BG = _draw(logits_BGV, fold(keys.tokens_BG, now.count_BG), sampling)
    return jnp.where(speaks_BG[..., None], decoder.embed(token_BG), x_BGD), token_BG, logp_BG

  speaks_BG &= ~now.done_BG
  silent = lambda x_BGD: (x_BGD, now.token_BG, jnp.zeros(now.token_BG.shape))
  x_BGD, token_BG, logp_BG = jax.lax.cond(jnp.any(speaks_BG), speak, silent, x_BGD)
  ended_BG = speaks_BG & (token_BG == vocabulary.document)
  spoke = lambda new_BG, old_BG: jnp.where(speaks_BG, new_BG, old_BG)
  taken = config.slots if advance and config.topology == "persistent" else 0
  private = config.topology == "private"  # its thoughts are dropped: what follows takes their slots
  count_BG = now.count_BG + speaks_BG
  return now._replace(
    streams=streams,
    x_BGD=x_BGD,
    slot_BG=spoke(count_BG if private else slot_BG + 1, slot_BG + 1),
    step_BG=spoke(-1, step_BG),
    token_BG=spoke(token_BG, now.token_BG),
    before_BG=spoke(now.token_BG, now.before_BG),
    position_BG=now.position_BG + speaks_BG,
    rotary_BG=now.rotary_BG + spoke(1 + taken * thinks_BG, 0),
    base_BGD=base_BGD,
    thinks_BG=thinks_BG,
    thoughts_BG=now.thoughts_BG + (real_BG & marked_BG),
    progress=progress,
    made_BGn=made_BGn,
    count_BG=count_BG,
    done_BG=now.done_BG | ended_BG | (count_BG == sampling.max_tokens),
    watched=watched,
    out=_say(config, decoder, now, speaks_BG, ended_BG, token_BG, logp_BG, thinks_BG, progress, made_BGn),
  )


def _reached(decoder, config, now: _Now, hidden_BGD, keys_BG, i_BG):
  """(progress of every thought, its tokens to show), as the slot that was fed leaves them; i_BG: think tokens fed."""
  real_BG, n = now.step_BG < 0, config.length
  fresh = halting.fresh(config, real_BG.shape, keys_BG)
  pick = lambda new, old: jnp.where(real_BG, new, old)
  progress = jax.tree.map(pick, fresh, now.progress)
  progress = halting.reached(decoder, config, progress, hidden_BGD, jnp.where(real_BG, 0, i_BG))
  made_BGn = jnp.where(real_BG[..., None], -1, now.made_BGn)
  if n and not config.kind_of.weighs:
    fed_BG = ~real_BG & (i_BG > 0) & (i_BG <= n)
    read = lambda: jnp.argmax(decoder.logits(hidden_BGD), axis=-1).astype(jnp.int32)
    token_BG = jax.lax.cond(jnp.any(fed_BG), read, lambda: jnp.zeros_like(now.token_BG))
    made_BGn = _put(made_BGn, token_BG, i_BG - 1, fed_BG)
  return progress, made_BGn


def _make(decoder, config, hidden_BGD, keys_BG, i_BG, makes_BG, x_BGD, progress, made_BGn):
  """(inputs, progress, tokens to show) with think token i of the streams that make one."""
  z_BGD, token_BG = emit(decoder, config, hidden_BGD, fold(keys_BG, i_BG), i_BG, progress)
  drawn = halting.drawn(decoder, config, progress, token_BG, i_BG)
  progress = jax.tree.map(lambda new, old: jnp.where(makes_BG, new, old), drawn, progress)
  if config.kind_of.weighs:
    made_BGn = _put(made_BGn, token_BG.astype(jnp.int32), i_BG, makes_BG)
  return jnp.where(makes_BG[..., None], z_BGD, x_BGD), progress, made_BGn


def _put(values_BGX, new_BG, index_BG, where_BG):
  """The values with new ones at an index of some streams."""
  hit_BGX = where_BG[..., None] & (jnp.arange(values_BGX.shape[2]) == index_BG[..., None])
  more = (1,) * (values_BGX.ndim - 3)
  return jnp.where(hit_BGX.reshape(*hit_BGX.shape, *more), new_BG[:, :, None], values_BGX)


def _say(config, decoder, now: _Now, speaks_BG, ended_BG, token_BG, logp_BG, thinks_BG, progress, made_BGn):
  """What has been said, with one more token of the streams that speak."""
  index_n, used_BG1 = jnp.arange(config.length), progress.used_X[..., None]
  shown_BGn = index_n < used_BG1
  if config.report:  # it stands behind a STOP that was drawn, which is a token more than are used
    shown_BGn = (index_n <= used_BG1) & (made_BGn != decoder.stop)
  thought_BGn = jnp.where(shown_BGn & thinks_BG[..., None], made_BGn, -1)
  put = lambda old_BGX, new_BG: _put(old_BGX, new_BG, now.count_BG, speaks_BG)
  return Generation(
    tokens_BX=put(now.out.tokens_BX, token_BG),
    logp_BX=put(now.out.logp_BX, logp_BG),
    length_B=now.out.length_B + (speaks_BG & ~ended_BG),
    thought_BX=put(now.out.thought_BX, thinks_BG),
    thoughts_BXn=put(now.out.thoughts_BXn, thought_BGn),
  )


def _marked(config, vocabulary, now: _Now, watcher):
  """(marked_BG: the newest real token is thought after, what the watcher has read with it).

  Of streams whose newest real token was fed before, neither means anything new.
  """
  if not config.length:
    return jnp.zeros_like(now.done_BG), now.watched
  need_BG2, watched = None, now.watched
  if watcher:
    follow = functools.partial(need.follow, watcher, watched, now.token_BG, now.position_BG, now.count_BG)
    skip = lambda: (jnp.zeros(now.token_BG.shape), watched)
    need_BG, watched = jax.lax.cond(jnp.any(now.step_BG < 0), follow, skip)
    need_BG2 = _two(need_BG, need_BG)
  position_BG2 = _two(now.position_BG - 1, now.position_BG)
  # The prompt's last token predicts the answer's first one: the first target with a weight.
  asked_BG2 = _two(jnp.zeros_like(now.done_BG), now.count_BG == 0)
  real_BG2 = jnp.ones_like(position_BG2)
  pair = Batch(_two(now.before_BG, now.token_BG), None, asked_BG2, real_BG2, position_BG2, None, need_BG2)
  pair = jax.tree.map(lambda a: a.reshape(-1, 2), pair)
  marked_BG = PLACEMENTS[config.placement](pair, config, vocabulary)[:, -1].reshape(now.done_BG.shape)
  return marked_BG & (now.thoughts_BG < config.cap) if config.cap else marked_BG, watched


def _two(first, second):
  return jnp.stack([first, second], axis=-1)


def _draw(logits_BGV, keys_BG, sampling: Sampling):
  """(token_BG, its log-probability under the unmodified distribution)."""
  kept_BGV = logits_BGV
  if sampling.top_k:
    smallest = jax.lax.top_k(logits_BGV, min(sampling.top_k, logits_BGV.shape[-1]))[0][..., -1:]
    kept_BGV = jnp.where(logits_BGV >= smallest, logits_BGV, MASKED)
  token_BG = draw(kept_BGV, keys_BG, sampling.temperature).astype(jnp.int32)
  return token_BG, categorical(logits_BGV, token_BG)[0]


def _prefill(decoder: Decoder, config, prompts: Batch, vocabulary, keys_B, G: int, sampling: Sampling, watcher) -> _Now:
  """The state before the first turn: everything of the prompts but their last tokens is in the cache."""
  (B, T), X, n = prompts.tokens_BT.shape, sampling.max_tokens, config.length
  length_B = jnp.sum(prompts.segments_BT > 0, axis=1)
  inside_BT = jnp.arange(T) < length_B[:, None] - 1
  batch = prompts.replace(segments_BT=jnp.where(inside_BT, prompts.segments_BT, 0))
  watched = None
  if watcher:
    need_BT, watched = need.begin(watcher, batch, G, X)
    batch = batch.replace(need_BT=need_BT)
  layout = place(batch, dataclasses.replace(config, room=0), vocabulary, aligned=0)
  thoughts_B = jnp.sum(layout.anchors_BN < T, axis=1)
  cache, segments_BS = _read(decoder, config, batch, layout, keys_B)
  persistent = config.topology == "persistent"
  moved_B = config.slots * thoughts_B * (persistent and config.rotary == "advance")
  last = lambda back: topology.take(prompts.tokens_BT, length_B[:, None] - back, 0)[:, 0]
  each = lambda a_B: jnp.broadcast_to(a_B[:, None], (B, G))
  full = lambda value, *shape: jnp.full((B, G, *shape), value)
  x_BGD = decoder.embed(each(last(1)))
  return _Now(
    streams=Streams.begin(decoder, cache, segments_BS > 0, G, _room(config, X)),
    x_BGD=x_BGD,
    slot_BG=full(0),
    step_BG=full(-1),
    token_BG=each(last(1)),
    before_BG=each(last(2)),
    position_BG=each(length_B - 1),
    rotary_BG=each(length_B - 1 + moved_B),
    base_BGD=jnp.zeros_like(x_BGD),
    thinks_BG=full(False),
    thoughts_BG=each(thoughts_B),
    progress=halting.fresh(config, (B, G), None),
    made_BGn=full(-1, n),
    count_BG=full(0),
    done_BG=full(False),
    watched=watched,
    out=Generation(
      tokens_BX=full(jnp.int32(vocabulary.document), X),
      logp_BX=full(0.0, X),
      length_B=full(0),
      thought_BX=full(False, X),
      thoughts_BXn=full(-1, X, n),
    ),
  )


def _read(decoder, config, batch: Batch, layout, keys_B):
  """(cache [L, B, S, K, E], segments_BS) of prompts, with their thoughts where these stay in the context."""
  if config.length and config.topology == "persistent" and layout.anchors_BN.shape[1]:
    stream = topology.persistent(batch, layout, config.slots, config.rotary)
    x_BSD = decoder.embed(topology.take(batch.tokens_BT, stream.token_BS, 0))
    keys_BN = None
    if config.random:
      keys_BN = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys_B, layout.anchors_BN)
    _, _, stream, cache = stream_serial(decoder, config, stream, x_BSD, keys_BN, layout)
    return cache, stream.segments_BS
  slot_T = jnp.arange(batch.tokens_BT.shape[1])
  mask = topology.sees(batch.segments_BT, batch.segments_BT, slot_T, slot_T)
  new = decoder(decoder.embed(batch.tokens_BT)[:, None], batch.positions_BT[:, None], mask)[1]
  return Cache(new.k[:, :, 0], new.v[:, :, 0]), batch.segments_BT
