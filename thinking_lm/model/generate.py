"""Cached decoding: the rollout's own block step, with real tokens drawn instead of given.

A step feeds the newest real token, thinks where the placement says so, and draws the next token from what follows.
Nobody thinks in a step where no row is at an anchor: the think slots are then really skipped.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from thinking_lm.model import need
from thinking_lm.model.decoder import Cache, Decoder, Model, Seen
from thinking_lm.model.layers import MASKED
from thinking_lm.model.readout import predict
from thinking_lm.model.serial import stream_serial
from thinking_lm.model.thinking import block, empty_cache, think, write
from thinking_lm.thoughts import topology
from thinking_lm.thoughts.placement import PLACEMENTS, place
from thinking_lm.thoughts.tokens import draw, fold
from thinking_lm.types import Batch, Params, Vocabulary


class Sampling(NamedTuple):
  """How real tokens are drawn. temperature 0 takes the most likely token; top_k 0 keeps all tokens."""

  max_tokens: int
  temperature: float = 1.0
  top_k: int = 0


@struct.dataclass
class Generation:
  """Continuations of B prompts, X = max_tokens.

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


class _State(NamedTuple):
  """What a decoding step carries: filled slots of the cache, and where each row stands."""

  i: jax.Array
  cache: Cache
  segments_BS: jax.Array
  token_B: jax.Array
  before_B: jax.Array
  position_B: jax.Array
  rotary_B: jax.Array
  thoughts_B: jax.Array
  done_B: jax.Array
  watched: need.Watched | None
  out: Generation


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
  prompt_keys_B, token_keys_B, think_keys_B = (fold(keys_B, use) for use in range(3))
  state = _prefill(decoder, config, prompts, vocabulary, prompt_keys_B, sampling.max_tokens, watcher)

  def step(state: _State) -> _State:
    marked_B, watched = _marked(config, vocabulary, state, watcher, prompts.tokens_BT.shape[1])
    keys = fold(think_keys_B, state.i) if config.random else None
    advance = _private_step if config.topology == "private" else _persistent_step
    cache, segments_BS, base_BD, hidden_BD, thought_Bn = advance(decoder, config, state, marked_B, keys)
    token_B, logp_B = _draw(predict(decoder, config, base_BD, hidden_BD), fold(token_keys_B, state.i), sampling)
    token_B = jnp.where(state.done_B, vocabulary.document, token_B)
    done_B = state.done_B | (token_B == vocabulary.document)
    put = lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, state.i, axis=1)
    out = Generation(
      tokens_BX=put(state.out.tokens_BX, token_B),
      logp_BX=put(state.out.logp_BX, jnp.where(state.done_B, 0.0, logp_B)),
      length_B=state.out.length_B + ~done_B,
      thought_BX=put(state.out.thought_BX, marked_B),
      thoughts_BXn=put(state.out.thoughts_BXn, jnp.where(marked_B[:, None], thought_Bn, -1)),
    )
    taken = config.slots * marked_B if config.rotary == "advance" and config.topology == "persistent" else 0
    return _State(
      i=state.i + 1,
      cache=cache,
      segments_BS=segments_BS,
      token_B=token_B,
      before_B=state.token_B,
      position_B=state.position_B + 1,
      rotary_B=state.rotary_B + 1 + taken,
      thoughts_B=state.thoughts_B + marked_B,
      done_B=done_B,
      watched=watched,
      out=out,
    )

  return jax.lax.while_loop(lambda s: (s.i < sampling.max_tokens) & ~jnp.all(s.done_B), step, state).out


def _marked(config, vocabulary, state: _State, watcher, T: int):
  """(marked_B: who thinks after the newest token, what the watcher has read with it); T: slots of the prompts."""
  two = lambda a, b: jnp.stack([a, b], axis=1)
  position_B2 = two(state.position_B - 1, state.position_B)
  # The prompt's last token predicts the answer's first one: the first target with a weight.
  asked_B2 = two(jnp.zeros_like(state.token_B), jnp.full_like(state.token_B, state.i == 0))
  need_B2, watched = None, state.watched
  if watcher:
    need_B, watched = need.follow(watcher, watched, state.token_B, state.position_B, T + state.i)
    need_B2 = two(need_B, need_B)
  real_B2 = jnp.ones_like(position_B2)
  pair = Batch(two(state.before_B, state.token_B), None, asked_B2, real_B2, position_B2, None, need_B2)
  if not config.length:
    return jnp.zeros_like(state.done_B), watched
  marked_B = PLACEMENTS[config.placement](pair, config, vocabulary)[:, -1] & ~state.done_B
  return marked_B & (state.thoughts_B < config.cap) if config.cap else marked_B, watched


def _draw(logits_BV, keys_B, sampling: Sampling):
  """(token_B, its log-probability under the unmodified distribution)."""
  kept_BV = logits_BV
  if sampling.top_k:
    smallest = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))[0][:, -1:]
    kept_BV = jnp.where(logits_BV >= smallest, logits_BV, MASKED)
  token_B = draw(kept_BV, keys_B, sampling.temperature).astype(jnp.int32)
  logp_BV = jax.nn.log_softmax(logits_BV)
  return token_B, jnp.take_along_axis(logp_BV, token_B[:, None], axis=1)[:, 0]


def _stride(config) -> int:
  """Cache slots that one decoding step fills."""
  return 1 + (config.slots if config.topology == "persistent" else 0)


def _prefill(decoder: Decoder, config, prompts: Batch, vocabulary, keys_B, max_tokens: int, watcher) -> _State:
  """The state before the first step: everything of the prompts but their last tokens is in the cache."""
  B, T = prompts.tokens_BT.shape
  length_B = jnp.sum(prompts.segments_BT > 0, axis=1)
  inside_BT = jnp.arange(T) < length_B[:, None] - 1
  batch = prompts.replace(segments_BT=jnp.where(inside_BT, prompts.segments_BT, 0))
  watched = None
  if watcher:
    need_BT, watched = need.begin(watcher, batch, max_tokens)
    batch = batch.replace(need_BT=need_BT)
  layout = place(batch, dataclasses.replace(config, room=0), vocabulary, aligned=0)
  N = layout.anchors_BN.shape[1]
  thoughts_B = jnp.sum(layout.anchors_BN < T, axis=1)
  moved_B = jnp.zeros_like(length_B)
  x_BTD = decoder.embed(batch.tokens_BT)
  if config.length and config.topology == "persistent" and N:
    stream = topology.persistent(batch, layout, config.slots, config.rotary)
    x_BSD = decoder.embed(topology.take(batch.tokens_BT, stream.token_BS, 0))
    keys_BN = None
    if config.random:
      keys_BN = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys_B, layout.anchors_BN)
    _, _, stream, cache = stream_serial(decoder, config, stream, x_BSD, keys_BN, layout)
    segments_BS = stream.segments_BS
    if config.rotary == "advance":
      moved_B = config.slots * thoughts_B
  else:
    slot_T = jnp.arange(T)
    mask = topology.sees(batch.segments_BT, batch.segments_BT, slot_T, slot_T)
    new = decoder(x_BTD[:, None], batch.positions_BT[:, None], mask)[1]
    cache, segments_BS = Cache(new.k[:, :, 0], new.v[:, :, 0]), batch.segments_BT
  room = max_tokens * _stride(config)
  cache = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), cache, empty_cache(decoder, B, room))
  last = lambda back: topology.take(prompts.tokens_BT, length_B[:, None] - back, 0)[:, 0]
  X, n = max_tokens, config.length
  return _State(
    i=jnp.zeros((), jnp.int32),
    cache=cache,
    segments_BS=jnp.pad(segments_BS, ((0, 0), (0, room))),
    token_B=last(1),
    before_B=last(2),
    position_B=length_B - 1,
    rotary_B=length_B - 1 + moved_B,
    thoughts_B=thoughts_B,
    done_B=jnp.zeros(B, bool),
    watched=watched,
    out=Generation(
      tokens_BX=jnp.full((B, X), vocabulary.document, jnp.int32),
      logp_BX=jnp.zeros((B, X)),
      length_B=jnp.zeros(B, jnp.int32),
      thought_BX=jnp.zeros((B, X), bool),
      thoughts_BXn=jnp.full((B, X, n), -1, jnp.int32),
    ),
  )


def _slot(config, state: _State):
  """First cache slot that the present step fills."""
  room = state.segments_BS.shape[1] - state.out.tokens_BX.shape[1] * _stride(config)
  return room + state.i * _stride(config)


def _positions(config, state: _State):
  """positions_BW: rotary positions of the real token and of the think slots after it."""
  step_W = jnp.arange(1 + config.slots) * (config.rotary == "advance")
  return state.rotary_B[:, None] + step_W


def _persistent_step(decoder, config, state: _State, marked_B, keys_B):
  """Feeds one real token and its thought, if any.

  Returns (cache, segments_BS, hidden state after the token, hidden state that predicts the next token, thought_Bn).
  """
  start, S = _slot(config, state), state.segments_BS.shape[1]
  segments_BW = jnp.concatenate(
    [jnp.ones_like(marked_B)[:, None], jnp.repeat(marked_B[:, None], config.slots, axis=1)], axis=1
  ).astype(jnp.int32)
  seen = topology.sees(segments_BW, state.segments_BS, jnp.full(segments_BW.shape[1], S), jnp.arange(S))
  past = Seen(state.cache, seen)
  x_B1D = decoder.embed(state.token_B)[:, None]
  if config.length:
    own, hidden_BWD, thoughts = block(
      decoder, config, past, x_B1D, segments_BW, _positions(config, state), keys_B, marked_B
    )
    last_B = jnp.where(marked_B, 1 + config.last(thoughts.used_BGN), 0)
    segments_BW = jnp.where(jnp.arange(1 + config.slots) > last_B[:, None], 0, segments_BW)
    hidden_BD = jnp.take_along_axis(hidden_BWD, last_B[:, None, None], axis=1)[:, 0]
    thought_Bn = _read(decoder, config, hidden_BWD[:, 1:], thoughts)
  else:
    hidden, own = decoder(x_B1D[:, None], state.rotary_B[:, None, None], jnp.ones((1, 1, 1, 1), bool), past)
    hidden_BD, thought_Bn = hidden[:, 0, 0], jnp.zeros((state.token_B.shape[0], 0), jnp.int32)
  segments_BS = jax.lax.dynamic_update_slice_in_dim(state.segments_BS, segments_BW, start, axis=1)
  return write(state.cache, own, start), segments_BS, hidden_BD, hidden_BD, thought_Bn


def _private_step(decoder, config, state: _State, marked_B, keys_B):
  """The same where the thought is dropped once the next token is drawn."""
  B, start = marked_B.shape[0], _slot(config, state)
  x_B1D = decoder.embed(state.token_B)[:, None]
  past = Seen(state.cache, (state.segments_BS > 0)[:, None, None])
  hidden, own = decoder(x_B1D[:, None], state.rotary_B[:, None, None], jnp.ones((1, 1, 1, 1), bool), past)
  cache = write(state.cache, own, start)
  segments_BS = state.segments_BS.at[:, start].set(1)
  if not config.length:
    return cache, segments_BS, hidden[:, 0, 0], hidden[:, 0, 0], jnp.zeros((B, 0), jnp.int32)

  def thinking(hidden_BD):
    own = Seen(empty_cache(decoder, B, 1, config.slots), jnp.zeros((1, 1, 1, 0), bool))
    past = Seen(cache, (segments_BS > 0)[:, None, None])
    keys = None if keys_B is None else keys_B[:, None]
    positions = _positions(config, state)[:, None, 1:]
    states, thoughts, _ = think(
      decoder, config, hidden_BD[:, None], positions, keys, past, own, wanted_BP=marked_B[:, None]
    )
    states, thoughts = jax.tree.map(lambda a: a[:, 0], (states, thoughts))
    last_B1 = config.last(thoughts.used_BGN)[:, None]
    end_BD = jnp.take_along_axis(states, jnp.maximum(last_B1, 0)[..., None], axis=1)[:, 0]
    hidden_BD = jnp.where(marked_B[:, None] & (last_B1 >= 0), end_BD, hidden_BD)
    return hidden_BD, _read(decoder, config, states, thoughts)

  skipping = lambda hidden_BD: (hidden_BD, jnp.full((B, config.length), -1, jnp.int32))
  base_BD = hidden[:, 0, 0]
  return cache, segments_BS, base_BD, *jax.lax.cond(jnp.any(marked_B), thinking, skipping, base_BD)


def _read(decoder, config, states_BJD, thoughts):
  """Tokens to show for a thought: its own, or what the head reads off each think slot; -1 from its end on."""
  tokens_Bn, index_n, used_B1 = thoughts.tokens_BGNJ, jnp.arange(config.length), thoughts.used_BGN[:, None]
  if config.kind in ("latent", "pause"):
    tokens_Bn = jnp.argmax(decoder.logits(states_BJD[:, config.opening : config.opening + config.length]), axis=-1)
  shown_Bn = index_n < used_B1
  if config.report:  # it stands behind a STOP that was drawn, which is a token more than are used
    shown_Bn = (index_n <= used_B1) & (tokens_Bn != decoder.stop)
  return jnp.where(shown_Bn, tokens_Bn, -1).astype(jnp.int32)
