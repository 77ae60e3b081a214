"""The rollout: the one place that runs the model over real and think slots, and turns what it saw into a Trace.

Two ways through the same decoder call. *Serially*: a scan over blocks of real tokens and think steps, where each think
token is made from the hidden state before it; gradients flow through the whole chain. *In parallel*: when all think
tokens are known (pause thoughts, drawn thoughts that are scored, thoughts that an evaluation puts in place of others)
one pass over all slots gives the same numbers.
"""

import jax
import jax.numpy as jnp

from thinking_lm.model.decoder import DTYPES, Cache, Decoder, Model, Seen
from thinking_lm.model.readout import policy, target_logp
from thinking_lm.thoughts import topology
from thinking_lm.thoughts.halting import HALTING
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Batch, Layout, Params, Thoughts, Trace


def rollout(
  model: Model, config: ThoughtConfig, params: Params, batch: Batch, layout: Layout, key, given: Thoughts | None = None
) -> Trace:
  """Thinks at the anchors of `layout` and scores the batch's targets.

  Args:
    key: random key; what is drawn depends on it, on `batch.ids_B`, the sample and the anchor only, not on how rows are
      grouped or sharded.
    given: think tokens to use instead of thinking. `inputs_BGNJD` are fed as they are.

  Returns:
    A Trace with G = config.samples (1 for the plain decoder). Gradients with respect to `params` flow through
    everything but the choice of sampled tokens.
  """
  run = _private if config.topology == "private" and config.length else _persistent
  keys_BGN = _keys(config, batch, layout, key)
  if given is None and config.length and not config.kind_of.serial:
    given = _pauses(model.bind(params), config, layout)
  if given is None and config.kind_of.policy and config.rescore and config.length:
    drawn = run(model.bind(jax.lax.stop_gradient(params)), config, batch, layout, keys_BGN, None).thoughts
    decoder = model.bind(params)
    given = Thoughts(decoder.embed(drawn.tokens_BGNJ), drawn.tokens_BGNJ)
  return run(model.bind(params), config, batch, layout, keys_BGN, given)


def _keys(config, batch, layout, key):
  """One key for each row, sample and anchor; None for kinds that draw nothing."""
  if not config.length or not config.kind_of.stochastic:
    return None
  fold = jax.random.fold_in
  keys_B = jax.vmap(fold, (None, 0))(key, batch.ids_B)
  keys_BG = jax.vmap(jax.vmap(fold, (None, 0)), (0, None))(keys_B, jnp.arange(config.samples))
  return jax.vmap(jax.vmap(jax.vmap(fold, (None, 0)), (0, None)))(keys_BG, layout.anchors_BN)


def _pauses(decoder, config, layout):
  shape = (layout.anchors_BN.shape[0], config.samples, layout.anchors_BN.shape[1], config.length)
  hidden = jnp.zeros((*shape, decoder.config.width))
  return Thoughts(*config.kind_of.step(decoder, hidden, None, config))


def _wrap(decoder, config, inputs_XnD):
  """Think slots of thoughts [..., J, D] from their think tokens [..., n, D]: START and STOP around them, if wanted."""
  if not config.delimiters:
    return inputs_XnD
  edge = (*inputs_XnD.shape[:-2], 1)
  start, stop = (decoder.embed(jnp.full(edge, row)) for row in (decoder.start, decoder.stop))
  return jnp.concatenate([start, inputs_XnD, stop], axis=-2)


def think(decoder: Decoder, config: ThoughtConfig, hidden_BPD, positions_BPJ, keys_BP, past: Seen | None, own: Seen):
  """Emits one thought in each of P streams, one slot after the other.

  Args:
    hidden_BPD: hidden state of each anchor.
    past: keys that all streams share, mask [B, P or 1, 1, S].
    own: keys of each stream, of which the last J slots are free for the thought; mask [B, P, 1, W - J] of the others.

  Returns:
    (hidden_BPJD of the think slots, inputs_BPnD and tokens_BPn of the think tokens, own cache with the thought in it).
  """
  J, n, first = config.slots, config.length, own.cache.k.shape[-3] - config.slots
  before = jnp.broadcast_to(own.mask_BPQS, (*hidden_BPD.shape[:2], 1, first))

  def slot(x_BPD, j, cache):
    done = jnp.broadcast_to(jnp.arange(J) < j, (*before.shape[:3], J))
    seen = Seen(cache, jnp.concatenate([before, done], axis=-1))
    position = jax.lax.dynamic_slice_in_dim(positions_BPJ, j, 1, axis=2)
    hidden, new = decoder(x_BPD[:, :, None], position, jnp.ones((1, 1, 1, 1), bool), past, seen)
    cache = jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, first + j, axis=3), cache, new)
    return hidden[:, :, 0], cache

  def control(row, j, cache):
    return slot(decoder.embed(jnp.full(hidden_BPD.shape[:2], row)), j, cache)

  def step(carry, i):
    hidden, cache = carry
    keys = None if keys_BP is None else jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys_BP, i)
    x, token = config.kind_of.step(decoder, hidden, keys, config)
    hidden, cache = slot(x, i + config.opening, cache)
    return (hidden, cache), (hidden, x, token)

  hidden, cache, around = hidden_BPD, own.cache, ([], [])
  if config.delimiters:
    hidden, cache = control(decoder.start, 0, cache)
    around[0].append(hidden[:, :, None])
  (hidden, cache), (states, inputs, tokens) = jax.lax.scan(step, (hidden, cache), jnp.arange(n))
  if config.delimiters:
    hidden, cache = control(decoder.stop, J - 1, cache)
    around[1].append(hidden[:, :, None])
  states, inputs, tokens = (jnp.moveaxis(a, 0, 2) for a in (states, inputs, tokens))
  return jnp.concatenate([*around[0], states, *around[1]], axis=2), inputs, tokens, cache


def _persistent(decoder, config, batch, layout, keys_BGN, given) -> Trace:
  """Thoughts in one stream with the real tokens. The G samples are rows of their own: their pasts differ."""
  B, G = batch.tokens_BT.shape[0], config.samples if config.length else 1
  grow = lambda a: jnp.repeat(a, G, axis=0)
  merge = lambda a: a.reshape(B * G, *a.shape[2:])
  rows, row_layout = jax.tree.map(grow, batch), jax.tree.map(grow, layout)
  J, N = config.slots, layout.anchors_BN.shape[1]
  stream = topology.persistent(rows, row_layout, J, config.rotary)
  tokens_BS = topology.take(rows.tokens_BT, stream.token_BS, 0)
  x_BSD = decoder.embed(tokens_BS)
  if not config.length:
    thoughts = Thoughts(
      jnp.zeros((*layout.anchors_BN.shape, 0, x_BSD.shape[-1])), jnp.zeros((*layout.anchors_BN.shape, 0))
    )
    hidden_BSD = _stream_parallel(decoder, stream, x_BSD)
  elif given is not None:
    thoughts = jax.tree.map(merge, given)
    slots_BND = _wrap(decoder, config, thoughts.inputs_BGNJD).reshape(x_BSD.shape[0], N * J, -1)
    index_BS = jnp.clip(stream.anchor_BS * J + stream.step_S, 0, N * J - 1)
    x_BSD = jnp.where(stream.step_S[:, None] < 0, x_BSD, _gather(slots_BND, index_BS))
    hidden_BSD = _stream_parallel(decoder, stream, x_BSD)
  else:
    keys = None if keys_BGN is None else merge(keys_BGN)
    hidden_BSD, thoughts, _ = stream_serial(decoder, config, stream, x_BSD, keys, N, layout.block)

  think_BX = (stream.thought_BN[..., None] + jnp.arange(J)).reshape(hidden_BSD.shape[0], N * J)
  think_BNJD = _gather(hidden_BSD, think_BX).reshape(*think_BX.shape[:1], N, J, hidden_BSD.shape[-1])
  anchor_BND = _gather(hidden_BSD, topology.take(stream.slot_BT, row_layout.anchors_BN, 0))
  logp_BT, hit_BT = target_logp(decoder, _gather(hidden_BSD, stream.readout_BT), rows.targets_BT)
  split = lambda a: a.reshape(B, G, *a.shape[1:])
  logp_BGT = split(logp_BT)
  outcome_BGN = jnp.einsum(
    "bnt,bt,bgt->bgn",
    _rest(batch, layout, config.lookahead).astype(jnp.float32),
    batch.weights_BT,
    logp_BGT,
    precision="highest",
  )
  before = (split(anchor_BND), split(think_BNJD))
  return _trace(
    decoder, config, batch, layout, jax.tree.map(split, thoughts), before, logp_BGT, split(hit_BT), outcome_BGN
  )


def _rest(batch, layout, lookahead):
  """inside_BNT: the targets that count for a thought: `lookahead` of them from its anchor on, 0 for the whole rest."""
  T = batch.tokens_BT.shape[1]
  ahead_BNT = jnp.arange(T) - layout.anchors_BN[..., None]
  same_BNT = batch.segments_BT[:, None] == topology.take(batch.segments_BT, layout.anchors_BN, 0)[..., None]
  return (ahead_BNT >= 0) & (ahead_BNT < (lookahead or T)) & same_BNT


def _stream_parallel(decoder, stream, x_BSD):
  slot_S = jnp.arange(x_BSD.shape[1])
  mask = topology.sees(stream.segments_BS, stream.segments_BS, slot_S, slot_S)
  return decoder(x_BSD[:, None], stream.positions_BS[:, None], mask)[0][:, 0]


def stream_serial(decoder, config, stream, x_BSD, keys_BN, N, C):
  """The scan over blocks, against a cache of earlier blocks. Returns (hidden_BSD, Thoughts [B, N, ...], the cache)."""
  B, S, D = x_BSD.shape
  W = C + config.slots
  R = S // W
  blocks = lambda a: jnp.moveaxis(a.reshape(B, R, W, *a.shape[2:]), 1, 0)
  anchor_RB = blocks(stream.anchor_BS)[:, :, -1]
  keys_RB = None
  if keys_BN is not None:
    keys_RB = jnp.take_along_axis(keys_BN, jnp.minimum(anchor_RB, N - 1).T, axis=1).T

  def body(cache, scanned):
    r, x_BWD, segments_BW, positions_BW, keys_B = scanned
    seen = topology.sees(segments_BW, stream.segments_BS, r * W + jnp.arange(W), jnp.arange(S))
    past = Seen(cache, seen & (jnp.arange(S) < r * W))
    own, hidden, inputs, tokens = block(decoder, config, past, x_BWD[:, :C], segments_BW, positions_BW, keys_B)
    return write(cache, own, r * W), (hidden, inputs, tokens)

  scanned = (jnp.arange(R), *map(blocks, (x_BSD, stream.segments_BS, stream.positions_BS)), keys_RB)
  cache, (hidden, inputs, tokens) = jax.lax.scan(body, empty_cache(decoder, B, S), scanned)
  hidden_BSD = jnp.moveaxis(hidden, 0, 1).reshape(B, S, D)
  block_BN = jnp.minimum(stream.thought_BN // W, R - 1)
  inputs_BNJD, tokens_BNJ = (
    jnp.take_along_axis(jnp.moveaxis(a, 0, 1), block_BN.reshape(B, N, *[1] * (a.ndim - 2)), axis=1)
    for a in (inputs, tokens)
  )
  return hidden_BSD, Thoughts(inputs_BNJD, tokens_BNJ), cache


def block(decoder: Decoder, config, past: Seen, x_BCD, segments_BW, positions_BW, keys_B, needed=None):
  """One block of a persistent stream: C real tokens at once, then the J slots of a thought one by one.

  Args:
    past: the cache of earlier blocks, mask [B, 1, W, S]. It is read and never changed.
    x_BCD: inputs of the real slots. segments_BW, positions_BW: documents (0 for empty slots) and rotary positions.
    keys_B: random keys of the thought, or None.
    needed: bool scalar; when false, nobody thinks in this block and the think slots are left undefined. None: always.

  Returns:
    (own cache [L, B, 1, W, K, E], hidden_BWD, inputs_BnD, tokens_Bn).
  """
  C, J, W = x_BCD.shape[1], config.slots, segments_BW.shape[1]
  mask = topology.sees(segments_BW, segments_BW, jnp.arange(W), jnp.arange(W))
  real_B1CD, new = decoder(
    x_BCD[:, None], positions_BW[:, None, :C], mask[:, :, :C, :C], Seen(past.cache, past.mask_BPQS[:, :, :C])
  )
  own = jax.tree.map(lambda a: jnp.pad(a, [(0, 0)] * 3 + [(0, J), (0, 0), (0, 0)]), new)
  last_B = jnp.maximum(jnp.sum(segments_BW[:, :C] > 0, axis=1) - 1, 0)
  anchor_B1D = jnp.take_along_axis(real_B1CD[:, 0], last_B[:, None, None], axis=1)

  def thinking(own):
    seen = Seen(past.cache, past.mask_BPQS[:, :, -1:])
    keys_B1 = None if keys_B is None else keys_B[:, None]
    own = Seen(own, mask[:, :, -1:, :C])
    hidden, inputs, tokens, own = think(decoder, config, anchor_B1D, positions_BW[:, None, C:], keys_B1, seen, own)
    return own, jnp.concatenate([real_B1CD, hidden], axis=2)[:, 0], inputs[:, 0], tokens[:, 0]

  if needed is None:
    return thinking(own)
  shapes = jax.eval_shape(thinking, own)
  skipped = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

  def skipping(own):
    return own, skipped[1].at[:, :C].set(real_B1CD[:, 0]), *skipped[2:]

  return jax.lax.cond(needed, thinking, skipping, own)


def empty_cache(decoder: Decoder, B: int, S: int) -> Cache:
  """A cache of S slots that nothing has been written to."""
  c = decoder.config
  shape = (c.layers, B, S, c.kv_heads, c.resolved_head_width)
  return Cache(*(jnp.zeros(shape, DTYPES[c.compute_dtype]) for _ in range(2)))


def write(cache: Cache, own: Cache, start) -> Cache:
  """The cache with a block's keys and values [L, B, 1, W, K, E] at slots start ... start + W - 1."""
  return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b[:, :, 0], start, axis=2), cache, own)


def _private(decoder, config, batch, layout, keys_BGN, given) -> Trace:
  """All thoughts of all anchors and samples side by side, on one shared prefix that knows nothing of them."""
  B, T = batch.tokens_BT.shape
  G, N, J, c = config.samples, layout.anchors_BN.shape[1], config.slots, decoder.config
  plan = topology.private(batch, layout, J, config.lookahead, config.rotary)
  slot_T = jnp.arange(T)
  mask = topology.sees(batch.segments_BT, batch.segments_BT, slot_T, slot_T)
  base_B1TD, prefix = decoder(decoder.embed(batch.tokens_BT)[:, None], batch.positions_BT[:, None], mask)
  base_logp_BT, base_hit_BT = target_logp(decoder, base_B1TD[:, 0], batch.targets_BT)
  tile = lambda a: jnp.tile(a, (1, G, *[1] * (a.ndim - 2)))  # streams are ordered (g, n)
  split = lambda a: a.reshape(B, G, N, *a.shape[2:])
  past = Seen(Cache(prefix.k[:, :, 0], prefix.v[:, :, 0]), tile(plan.prefix_BNT)[:, :, None])
  positions_BPX = tile(plan.positions_BNX)
  anchor_BPD = tile(_gather(base_B1TD[:, 0], jnp.minimum(layout.anchors_BN, T - 1)))
  ahead = decoder.embed(tile(topology.take(batch.tokens_BT, plan.ahead_BNA.reshape(B, -1), 0).reshape(B, N, -1)))
  A = ahead.shape[2]
  if given is not None:
    thoughts = jax.tree.map(lambda a: a.reshape(B, G * N, *a.shape[3:]), given)
    x = jnp.concatenate([_wrap(decoder, config, thoughts.inputs_BGNJD), ahead], axis=2)
    causal = jnp.tril(jnp.ones((J + A, J + A), bool))[None, None]
    hidden = decoder(x, positions_BPX, causal, past)[0]
  else:
    empty = jnp.zeros((c.layers, B, G * N, J, c.kv_heads, c.resolved_head_width), ahead.dtype)
    own = Seen(Cache(empty, empty), jnp.zeros((1, 1, 1, 0), bool))
    keys_BP = None if keys_BGN is None else keys_BGN.reshape(B, G * N)
    hidden, inputs, tokens, cache = think(decoder, config, anchor_BPD, positions_BPX[:, :, :J], keys_BP, past, own)
    thoughts = Thoughts(inputs, tokens)
    if A:
      causal = jnp.tril(jnp.ones((A, A), bool))[None, None]
      own = Seen(cache, jnp.ones((1, 1, 1, J), bool))
      hidden = jnp.concatenate([hidden, decoder(ahead, positions_BPX[:, :, J:], causal, past, own)[0]], axis=2)

  target_BNM = plan.target_BNM.reshape(B, -1)
  weights_BNM = topology.take(batch.weights_BT, target_BNM, 0).reshape(B, N, -1)
  targets_BPM = tile(topology.take(batch.targets_BT, target_BNM, 0).reshape(B, N, -1))
  logp_BGNM, hit_BGNM = map(split, target_logp(decoder, hidden[:, :, J - 1 :], targets_BPM))
  put = jax.vmap(lambda base_T, new_N, at_N: base_T.at[at_N].set(new_N, mode="drop"))  # over rows
  put = jax.vmap(put, (None, 1, None), 1)  # over samples
  logp_BGT = put(base_logp_BT, logp_BGNM[..., 0], layout.anchors_BN)
  hit_BGT = put(base_hit_BT, hit_BGNM[..., 0], layout.anchors_BN)
  outcome_BGN = jnp.sum(logp_BGNM * weights_BNM[:, None], axis=-1)
  before = (split(anchor_BPD), split(hidden[:, :, :J]))
  trace = _trace(decoder, config, batch, layout, jax.tree.map(split, thoughts), before, logp_BGT, hit_BGT, outcome_BGN)
  trace = trace.replace(base_logp_BT=base_logp_BT)
  return trace.replace(ahead_logp_BGNA=logp_BGNM[..., 1:], ahead_weights_BNA=weights_BNM[..., 1:]) if A else trace


def _trace(decoder, config, batch, layout, thoughts, before, logp_BGT, hit_BGT, outcome_BGN) -> Trace:
  valid_BN = layout.anchors_BN < batch.tokens_BT.shape[1]
  valid_BGN = jnp.broadcast_to(valid_BN[:, None], outcome_BGN.shape)
  policy_BGN = entropy_BGN = jnp.zeros(outcome_BGN.shape)
  if config.length and config.kind_of.policy:
    anchor_BGND, think_BGNJD = before
    hidden = jnp.concatenate([anchor_BGND[..., None, :], think_BGNJD], axis=-2)
    hidden = hidden[..., config.opening : config.opening + config.length, :]
    logp_BGNJ, entropy_BGNJ = policy(decoder, hidden, thoughts.tokens_BGNJ, config.temperature)
    policy_BGN = jnp.where(valid_BGN, logp_BGNJ.sum(-1), 0.0)
    entropy_BGN = jnp.where(valid_BGN, entropy_BGNJ.mean(-1), 0.0)
  return Trace(
    logp_BGT=logp_BGT,
    hit_BGT=hit_BGT,
    weights_BT=batch.weights_BT,
    base_logp_BT=None,
    ahead_logp_BGNA=None,
    ahead_weights_BNA=None,
    outcome_BGN=jnp.where(valid_BGN, outcome_BGN, 0.0),
    policy_logp_BGN=policy_BGN,
    entropy_BGN=entropy_BGN,
    valid_BN=valid_BN,
    used_BGN=HALTING[config.halting](config.length, valid_BGN),
    thoughts=jax.lax.stop_gradient(thoughts),
  )


def _gather(values_BSD, index_BX):
  """values_BSD[b, index_BX[b, x]]; indices out of range read the last slot (what comes of them is masked)."""
  return jnp.take_along_axis(values_BSD, jnp.minimum(index_BX, values_BSD.shape[1] - 1)[..., None], axis=1)
