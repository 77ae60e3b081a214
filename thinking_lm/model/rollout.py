"""The rollout: the one place that runs the model over real and think slots, and turns what it saw into a Trace.

Two ways through the same decoder call. *Serially*: a scan over blocks of real tokens and think steps, where each think
token is made from the hidden state before it; gradients flow through the whole chain. *In parallel*: when all think
tokens are known (pause thoughts, drawn thoughts that are scored, thoughts that an evaluation puts in place of others)
one pass over all slots gives the same numbers; when they are guessed, several passes come near (`model/jacobi.py`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from thinking_lm.model import behind, relaxing, replay
from thinking_lm.model.decoder import Model, Seen
from thinking_lm.model.jacobi import stream_iterated
from thinking_lm.model.readout import mixed_logp, policy, several_logp, target_logp, token_policy, weight
from thinking_lm.model.serial import stream_serial
from thinking_lm.model.thinking import empty_cache, tapped, think
from thinking_lm.thoughts import answer, halting, report, topology
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Batch, Layout, Params, Report, Thoughts, Trace


def rollout(
  model: Model,
  config: ThoughtConfig,
  params: Params,
  batch: Batch,
  layout: Layout,
  key,
  given: Thoughts | None = None,
  taps_BGNnD=None,
) -> Trace:
  """Thinks at the anchors of `layout` and scores the batch's targets.

  Args:
    key: random key; what is drawn depends on it, on `batch.ids_B`, the sample and the anchor only, not on how rows are
      grouped or sharded.
    given: think tokens to use instead of thinking. `inputs_BGNJD` are fed as they are.
    taps_BGNnD: zeros, whose gradient is that of the input of each think token, through all that is made of it. For
      thoughts that gradients flow through (`ThoughtConfig.chained`).

  Returns:
    A Trace with G = config.samples (1 for the plain decoder). Gradients with respect to `params` flow through
    everything but the choice of sampled tokens.
  """
  if config.length and not layout.anchors_BN.shape[1]:  # rows too short for a single thought
    trace = rollout(model, dataclasses.replace(config, length=0), params, batch, layout, key)
    if config.topology == "private":
      trace = trace.replace(base_logp_BT=trace.logp_BGT[:, 0], base_outcome_BN=trace.outcome_BGN[:, 0])
    return trace
  run = _private if config.topology == "private" and config.length else _persistent
  keys_BGN = _keys(config, batch, layout, key)
  decoder, drawer = model.bind(params), None
  if given is None and config.length and not config.serial and not config.iterations:
    given = _pauses(decoder, config, layout)
  if given is None and config.rescored:
    drawer = model.bind(jax.lax.stop_gradient(params))
  return run(decoder, drawer, config, batch, layout, keys_BGN, given, taps_BGNnD)


def _keys(config, batch, layout, key):
  """One key for each row, sample and anchor; None where nothing is drawn."""
  if not config.random:
    return None
  one = jax.random.fold_in
  keys_B = jax.vmap(one, (None, 0))(key, batch.ids_B)
  keys_BG = jax.vmap(jax.vmap(one, (None, 0)), (0, None))(keys_B, jnp.arange(config.samples))
  return jax.vmap(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(keys_BG, layout.anchors_BN)


def _pauses(decoder, config, layout):
  shape = (layout.anchors_BN.shape[0], config.samples, layout.anchors_BN.shape[1], config.length)
  hidden = jnp.zeros((*shape, decoder.config.width))
  return Thoughts(*config.kind_of.step(decoder, hidden, None, config))


def actions(decoder, config, drawn: Thoughts) -> Thoughts:
  """Drawn thoughts as they are fed when they are scored: embeddings of ids are learned, other actions are constants."""
  return drawn.replace(inputs_BGNJD=decoder.embed(drawn.tokens_BGNJ)) if config.kind_of.discrete else drawn


def _wrap(decoder, config, thoughts):
  """Think slots of thoughts [..., J, D] from their think tokens [..., n, D]: START and STOP around them, if wanted."""
  edge = thoughts.inputs_BGNJD.shape[:-2]
  start = decoder.embed_row(decoder.start, *edge, config.opening)
  stop = decoder.embed_row(decoder.stop, *edge, config.closing)
  slots_XJD = jnp.concatenate([start, thoughts.inputs_BGNJD, stop], axis=-2)
  if not config.may_stop or config.report:  # a report ends behind its STOP
    return slots_XJD
  closed_XJ = jnp.arange(config.slots) == behind.last(decoder, config, thoughts)[..., None]
  return jnp.where(closed_XJ[..., None], stop, slots_XJD)


def _persistent(decoder, drawer, config, batch, layout, keys_BGN, given, taps_BGNnD) -> Trace:
  """Thoughts in one stream with the real tokens. The G samples are rows of their own: their pasts differ."""
  B, G = batch.tokens_BT.shape[0], config.samples if config.length else 1
  N, J = layout.anchors_BN.shape[1], config.slots
  merge = lambda a: a.reshape(B * G, *a.shape[2:])
  split = lambda a: a.reshape(B, G, *a.shape[1:])
  rows, row_layout = jax.tree.map(lambda a: jnp.repeat(a, G, axis=0), (batch, layout))
  stream = topology.persistent(rows, row_layout, J, config.rotary)
  keys_BN = None if keys_BGN is None else merge(keys_BGN)
  given, taps = jax.tree.map(merge, (given, taps_BGNnD))
  found = _stream(decoder, drawer, config, rows, stream, keys_BN, row_layout, given, taps)
  hidden_BSD, thoughts, stream, residual = found

  think_BX = (stream.thought_BN[..., None] + jnp.arange(J)).reshape(B * G, N * J)
  think_BNJD = _gather(hidden_BSD, think_BX).reshape(B * G, N, J, hidden_BSD.shape[-1])
  anchor_BND = _gather(hidden_BSD, topology.take(stream.slot_BT, row_layout.anchors_BN, 0))
  readout_BTD = _gather(hidden_BSD, stream.readout_BT)
  logp_BT, hit_BT, top_BT = target_logp(decoder, readout_BTD, rows.targets_BT)
  inside_BNT = topology.rest(batch, layout, config.lookahead).astype(jnp.float32)
  weigh = lambda a_BGT: jnp.einsum("bnt,bt,bgt->bgn", inside_BNT, batch.weights_BT, a_BGT, precision="highest")
  outcome_BGN, missed_BGN = weigh(split(logp_BT)), weigh((~split(hit_BT)).astype(jnp.float32))
  thoughts, anchor_BGND, think_BGNJD = jax.tree.map(split, (thoughts, anchor_BND, think_BNJD))
  policy = _policy(decoder, config, anchor_BGND, think_BGNJD, thoughts)
  trace = _trace(decoder, config, batch, layout, thoughts, policy, split(logp_BT), split(hit_BT), outcome_BGN)
  trace = trace.replace(value_BGN=_value(decoder, anchor_BGND))
  unit_BN, unit_BT = topology.documents(batch, layout)
  end_BGND = split(_gather(readout_BTD, row_layout.anchors_BN))
  return trace.replace(
    unit_BN=unit_BN,
    unit_BT=unit_BT,
    residual_BGN=None if residual is None else split(residual),
    free_BT=jnp.where(unit_BT < N, 0, batch.weights_BT),
    outcome_hit_BGN=missed_BGN == 0,
    top_logp_BGT=split(top_BT),
    report=_report(decoder, config, batch, layout, thoughts, anchor_BGND, end_BGND),
  )


def _stream(decoder, drawer, config, rows, stream, keys_BN, layout, given, taps_BNnD):
  """(hidden_BSD of all slots, Thoughts [B, N, ...], the stream with the ends of its thoughts, residual_BN or None)."""
  x_BSD = decoder.embed(topology.take(rows.tokens_BT, stream.token_BS, 0))
  B, S, D = x_BSD.shape

  def at_once(decoder, x_BSD, stream):
    mask = topology.sees(stream.segments_BS, stream.segments_BS, jnp.arange(S), jnp.arange(S))
    return decoder(x_BSD[:, None], stream.positions_BS[:, None], mask)[0][:, 0]

  def fed(decoder, x_BSD, thoughts):
    slots_BXD = _wrap(decoder, config, thoughts).reshape(B, -1, D)
    index_BS = stream.anchor_BS * config.slots + stream.step_S
    return jnp.where(stream.step_S[:, None] < 0, x_BSD, _gather(slots_BXD, jnp.maximum(index_BS, 0)))

  if not config.length:
    N = layout.anchors_BN.shape[1]
    nothing = Thoughts(jnp.zeros((B, N, 0, D)), jnp.zeros((B, N, 0), jnp.int32))
    return at_once(decoder, x_BSD, stream), nothing, stream, None
  if given is None and config.iterations:
    one_pass = lambda decoder, x_BSD, thoughts: at_once(decoder, fed(decoder, x_BSD, thoughts), stream)
    hidden_BSD, thoughts, residual_BN = stream_iterated(decoder, config, stream, layout, x_BSD, one_pass)
    return hidden_BSD, thoughts, topology.end(stream, behind.last(decoder, config, thoughts)), residual_BN
  if given is None and drawer is not None:
    drawn = stream_serial(drawer, config, stream, jax.lax.stop_gradient(x_BSD), keys_BN, layout)[1]
    given = actions(decoder, config, drawn)
  if given is None:
    return *stream_serial(decoder, config, stream, x_BSD, keys_BN, layout, taps_BNnD)[:3], None
  ended = topology.end(stream, behind.last(decoder, config, given))
  return at_once(decoder, fed(decoder, x_BSD, given), ended), given, ended, None


def _private(decoder, drawer, config, batch, layout, keys_BGN, given, taps_BGNnD) -> Trace:
  """All thoughts of all anchors and samples side by side, on one shared prefix that knows nothing of them."""
  B, T = batch.tokens_BT.shape
  G, N, J = config.samples, layout.anchors_BN.shape[1], config.slots
  plan = topology.private(batch, layout, J, config.lookahead, config.rotary, config.answer)
  mask = topology.sees(batch.segments_BT, batch.segments_BT, jnp.arange(T), jnp.arange(T))
  tile = lambda a: jnp.tile(a, (1, G, *[1] * (a.ndim - 2)))  # the P = G N streams are ordered (g, n)
  split = lambda a: a.reshape(B, G, N, *a.shape[2:])
  pick = lambda a, index, fill: topology.take(a, index.reshape(B, -1), fill).reshape(B, N, -1)
  anchors = lambda hidden_B1TD: tile(_gather(hidden_B1TD[:, 0], layout.anchors_BN))
  ahead_BPAD = decoder.embed(tile(pick(batch.tokens_BT, plan.ahead_BNA, 0)))
  keys_BP = None if keys_BGN is None else keys_BGN.reshape(B, G * N)
  given, taps = jax.tree.map(lambda a: a.reshape(B, G * N, *a.shape[3:]), (given, taps_BGNnD))
  prefix_BP1T = tile(plan.prefix_BNT)[:, :, None]
  facts = replay.Pass(batch.positions_BT[:, None], mask, tile(plan.positions_BNX), None, prefix_BP1T)
  inputs = (decoder.embed(batch.tokens_BT)[:, None], anchors, ahead_BPAD, keys_BP, facts)
  if given is None and drawer is not None:
    (base_B1TD, hidden_BPXD), thoughts, prefix, scores = _drawn(decoder, drawer, config, *inputs)
  else:
    (base_B1TD, hidden_BPXD), thoughts, prefix, scores = _made(decoder, config, *inputs, given, taps)
  anchor_BPD = anchors(base_B1TD)
  base_logp_BT, base_hit_BT, base_top_BT = target_logp(decoder, base_B1TD[:, 0], batch.targets_BT)

  weights_BNM = pick(batch.weights_BT, plan.target_BNM, 0)
  targets_BPM = tile(pick(batch.targets_BT, plan.target_BNM, 0))
  end_BP1D = behind.end(config, anchor_BPD, hidden_BPXD, config.used(thoughts, decoder.stop))
  readout_BPMD = jnp.concatenate([end_BP1D, hidden_BPXD[:, :, J : J + config.lookahead - 1]], axis=2)
  without_BPMD = tile(_gather(base_B1TD[:, 0], plan.target_BNM.reshape(B, -1)).reshape(B, N, config.lookahead, -1))
  logp_BGNM, hit_BGNM, top_BGNM = map(split, mixed_logp(decoder, config, without_BPMD, readout_BPMD, targets_BPM))
  put = jax.vmap(jax.vmap(lambda base_T, new_N, at_N: base_T.at[at_N].set(new_N, mode="drop"), (None, 0, None)))
  logp_BGT = put(base_logp_BT, logp_BGNM[..., 0], layout.anchors_BN)
  hit_BGT = put(base_hit_BT, hit_BGNM[..., 0], layout.anchors_BN)
  outcome_BGN = jnp.sum(logp_BGNM * weights_BNM[:, None], axis=-1)
  thoughts = jax.tree.map(split, thoughts)
  policy = _policy(decoder, config, split(anchor_BPD), split(hidden_BPXD[:, :, :J]), thoughts, scores)
  policy = _answered(decoder, config, policy, end_BP1D, hidden_BPXD, thoughts.answer_BGNA)
  trace = _trace(decoder, config, batch, layout, thoughts, policy, logp_BGT, hit_BGT, outcome_BGN)
  unit_BN = jnp.broadcast_to(jnp.arange(N), (B, N))
  unit_BT = topology.scatter((B, T), N, layout.anchors_BN, unit_BN)
  trace = trace.replace(
    unit_BN=unit_BN,
    unit_BT=unit_BT,
    free_BT=jnp.where(unit_BT < N, 0, batch.weights_BT),
    base_logp_BT=base_logp_BT,
    base_outcome_BN=jnp.sum(pick(base_logp_BT, plan.target_BNM, 0) * weights_BNM, axis=-1),
    outcome_hit_BGN=jnp.all(hit_BGNM | (weights_BNM == 0)[:, None], axis=-1),
    top_logp_BGT=put(base_top_BT, top_BGNM[..., 0], layout.anchors_BN),
    report=_report(decoder, config, batch, layout, thoughts, split(anchor_BPD), split(end_BP1D[:, :, 0])),
  )
  if config.relaxation and drawer is not None:
    before_BPD = hidden_BPXD[:, :, 0] if config.opening else anchor_BPD
    drawn = (decoder, drawer, config, before_BPD, thoughts.tokens_BGNJ.reshape(B, G * N), keys_BP)
    found = _controls(*drawn, anchor_BPD, ahead_BPAD, facts, prefix, targets_BPM, tile(weights_BNM))
    trace = trace.replace(**jax.tree.map(split, found))
  learned = _learned(decoder, config, anchor_BPD, hidden_BPXD, readout_BPMD, targets_BPM, tile(weights_BNM))
  trace = trace.replace(**jax.tree.map(split, learned))
  if config.lookahead > 1:
    trace = trace.replace(ahead_logp_BGNA=logp_BGNM[..., 1:], ahead_weights_BNA=weights_BNM[..., 1:])
  return trace


def _controls(decoder, drawer, config, before, tokens, keys, anchor, ahead, facts, prefix, targets, weights) -> dict:
  """Control variates of P drawn tokens, as in Trace: what a head says of relaxed copies, or the outcome after these."""
  drawn = (decoder, drawer, config, before, tokens, keys)
  if "surrogate" in decoder.heads:
    return dict(surrogate=relaxing.learned(*drawn))
  anchor, ahead, past = jax.lax.stop_gradient((anchor, ahead, facts.past(prefix)))
  copies = relaxing.copies(*drawn)
  hidden = _side_by_side(drawer, config, anchor, ahead, facts.positions_BPX, None, past, copies)[0]
  logp_BPM = target_logp(drawer, hidden[:, :, config.slots - 1 :], targets)[0]
  return dict(relaxed_BGN=jnp.sum(logp_BPM * weights, axis=-1))


def _drawn(decoder, drawer, config, x_B1TD, anchors, ahead_BPAD, keys_BP, facts):
  """Draws, and scores what was drawn without running it again.

  Returns:
    ((hidden_B1TD of the real tokens, hidden_BPXD of think slots and look-ahead tokens), Thoughts [B, P, ...], Cache of
    the real tokens, without gradient, log pi and entropy of the think tokens as they were drawn, nats [n, B, P]).
  """
  x, A = jax.lax.stop_gradient(x_B1TD), ahead_BPAD.shape[2]
  drawn, end_B1TD, prefix, base, draft = replay.draw(drawer, config, x, anchors, facts.positions_BPX, keys_BP, facts)
  end_BPXD, ahead_inputs = jnp.moveaxis(draft.end_JBPD, 0, 2), None
  if config.answer:
    states = (anchors(drawer.final_norm(end_B1TD)), drawer.final_norm(end_BPXD))
    places = (facts.positions_BPX, keys_BP, facts.past(prefix), draft.cache)
    drawn = behind.answer(drawer, config, *states, *places, drawn, A)
  thoughts, ahead_BPAD = actions(decoder, config, drawn), behind.tokens(decoder, ahead_BPAD, drawn)
  facts = facts._replace(mask_BPXX=behind.mask(drawer, config, drawn, A, ahead_BPAD.shape[2]))
  if ahead_BPAD.shape[2]:
    ahead = jax.lax.stop_gradient(ahead_BPAD)
    end_BPAD, ahead_inputs = replay.ahead(drawer, ahead, behind.live(drawer, config, drawn), facts, prefix, draft)
    end_BPXD = jnp.concatenate([end_BPXD, end_BPAD], axis=2)
  slots_BPXD = jnp.concatenate([_wrap(decoder, config, thoughts), ahead_BPAD], axis=2)
  kept = replay.Kept(base, draft.inputs_LJBPD, ahead_inputs)
  hidden = replay.replayed(decoder, x_B1TD, slots_BPXD, facts, kept, (end_B1TD, end_BPXD))
  return hidden, thoughts, prefix, (draft.logp_nBP, draft.entropy_nBP)


def _made(decoder, config, x_B1TD, anchors, ahead_BPAD, keys_BP, facts, given, taps_BPnD):
  """The same for thoughts that are given, or made with gradients through every step; not scored yet."""
  base_B1TD, prefix = decoder(x_B1TD, facts.positions_B1T, facts.mask_B1TT)
  streams = (anchors(base_B1TD), ahead_BPAD, facts.positions_BPX, keys_BP, facts.past(prefix), given, taps_BPnD)
  hidden_BPXD, thoughts = _side_by_side(decoder, config, *streams)
  return (base_B1TD, hidden_BPXD), thoughts, prefix, None


def _side_by_side(decoder, config, anchor_BPD, ahead_BPAD, positions_BPX, keys_BP, past, given, taps_BPnD=None):
  """(hidden_BPXD of the J think slots, A look-ahead tokens and answers of P private streams, Thoughts [B, P, ...])."""
  (B, P, A, _), J = ahead_BPAD.shape, config.slots
  if given is not None:
    x = jnp.concatenate([_wrap(decoder, config, given), behind.tokens(decoder, ahead_BPAD, given)], axis=2)
    mask = behind.mask(decoder, config, given, A, x.shape[2] - J)
    return decoder(x, positions_BPX[:, :, : x.shape[2]], mask, past)[0], given
  fresh = Seen(empty_cache(decoder, B, P, J), jnp.zeros((1, 1, 1, 0), bool))
  make = None if taps_BPnD is None else functools.partial(tapped, decoder, config, taps_BPnD)
  streams = (anchor_BPD, positions_BPX[:, :, :J], keys_BP, past, fresh)
  hidden, thoughts, cache = think(decoder, config, *streams, make=make)
  if config.answer:
    thoughts = behind.answer(decoder, config, anchor_BPD, hidden, positions_BPX, keys_BP, past, cache, thoughts, A)
  x = behind.tokens(decoder, ahead_BPAD, thoughts)
  if x.shape[2]:
    own = Seen(cache, behind.live(decoder, config, thoughts)[:, :, None])
    mask = behind.mask(decoder, config, thoughts, A, x.shape[2])[:, :, J:, J:]
    hidden = jnp.concatenate([hidden, decoder(x, positions_BPX[:, :, J:], mask, past, own)[0]], axis=2)
  return hidden, thoughts


def _learned(decoder, config, anchor_BPD, hidden_BPJD, readout_BPMD, targets_BPM, weights_BPM) -> dict:
  """What heads say of P private thoughts, as in Trace: their value, how they are mixed, and their exits."""
  mixed = {} if config.mixing == "none" else dict(mix_BGN=weight(decoder, config, anchor_BPD, readout_BPMD[:, :, 0]))
  mixed |= dict(value_BGN=_value(decoder, anchor_BPD))
  if not config.learns_end:
    return mixed
  states_BPKD = jnp.concatenate([anchor_BPD[:, :, None], hidden_BPJD], axis=2)[:, :, jnp.asarray(halting.exits(config))]
  tile = lambda a_BP: jnp.broadcast_to(a_BP[..., None], states_BPKD.shape[:3])
  base_BPKD = jnp.broadcast_to(anchor_BPD[:, :, None], states_BPKD.shape)
  logp_BPK = mixed_logp(decoder, config, base_BPKD, states_BPKD, tile(targets_BPM[..., 0]))[0]
  exit_logp_BPK = halting.exit_logp(decoder, config, states_BPKD)
  return mixed | dict(exit_logp_BGNK=exit_logp_BPK, exit_outcome_BGNK=logp_BPK * tile(weights_BPM[..., 0]))


def _policy(decoder, config, anchor_BGND, think_BGNJD, thoughts, scores=None):
  """(log pi(z | x), mean entropy) of each thought [B, G, N], log pi by token, which tokens; None without a policy.

  Args:
    scores: (log pi, entropy) as they were drawn, [n, B, G N].
  """
  if not config.length or not config.kind_of.policy:
    return None
  before = jnp.concatenate([anchor_BGND[..., None, :], think_BGNJD], axis=-2)
  before = before[..., config.opening : config.opening + config.length, :]
  if scores is not None:
    scores = tuple(jnp.moveaxis(a_nBP, 0, -1).reshape(before.shape[:-1]) for a_nBP in scores)
  logp_BGNJ, entropy_BGNJ = policy(decoder, config, before, thoughts, scores)
  chosen_BGNJ = config.chosen(config.used(thoughts, decoder.stop))
  logp_BGNJ, entropy_BGNJ = (jnp.where(chosen_BGNJ, a, 0.0) for a in (logp_BGNJ, entropy_BGNJ))
  entropy_BGN = entropy_BGNJ.sum(axis=-1) / jnp.maximum(chosen_BGNJ.sum(axis=-1), 1)
  return logp_BGNJ.sum(axis=-1), entropy_BGN, logp_BGNJ, chosen_BGNJ


def _answered(decoder, config, policy, end_BP1D, hidden_BPXD, answer_BGNA):
  """`policy` with what each thought answers: its first token is drawn at the end of it, the others in the last slots
  of the stream.
  """
  if answer_BGNA is None:
    return policy
  (B, G, N, m), X = answer_BGNA.shape, hidden_BPXD.shape[2]
  states_BPAD = jnp.concatenate([end_BP1D, hidden_BPXD[:, :, X - m + 1 :]], axis=2)
  states_BGNAD = states_BPAD.reshape(B, G, N, *states_BPAD.shape[2:])
  logp_BGN, entropy_BGN, logp_BGNJ, chosen_BGNJ = policy
  chosen_BGNA = answer.exists(answer_BGNA, decoder.border)
  answer_logp_BGNA = jnp.where(chosen_BGNA, token_policy(decoder, config, states_BGNAD, answer_BGNA)[0], 0.0)
  join = lambda a, b: jnp.concatenate([a, b], axis=-1)
  joined = join(logp_BGNJ, answer_logp_BGNA), join(chosen_BGNJ, chosen_BGNA)
  return logp_BGN + answer_logp_BGNA.sum(axis=-1), entropy_BGN, *joined


def _value(decoder, anchor_BGND):
  """What the value head expects of each thought, [B, G, N]; its error does not teach the body. None without one."""
  return decoder.heads["value"](jax.lax.stop_gradient(anchor_BGND)) if "value" in decoder.heads else None


def _report(decoder, config, batch, layout, thoughts, anchor_BGND, end_BGND) -> Report | None:
  """What the thoughts say, and what the model would do at their end."""
  if not config.confidences:
    return None
  candidates_BGNI, confidences_BGNI = report.pairs(thoughts.tokens_BGNJ, config, decoder.stop, decoder.lowest)
  actual_BGNI = several_logp(decoder, config, anchor_BGND, end_BGND, candidates_BGNI)
  return Report(
    candidates_BGNI=candidates_BGNI,
    confidences_BGNI=confidences_BGNI,
    actual_BGNI=jax.lax.stop_gradient(jnp.exp(actual_BGNI)),
    target_BN=topology.take(batch.targets_BT, layout.anchors_BN, 0),
    weight_BN=topology.take(batch.weights_BT, layout.anchors_BN, 0.0),
    anchors_BN=layout.anchors_BN,
    vocabulary=decoder.vocabulary_size,
  )


def _trace(decoder, config, batch, layout, thoughts, policy, logp_BGT, hit_BGT, outcome_BGN) -> Trace:
  valid_BN = layout.anchors_BN < batch.tokens_BT.shape[1]
  valid_BGN = jnp.broadcast_to(valid_BN[:, None], outcome_BGN.shape)
  only = lambda a: jnp.where(valid_BGN, a, 0.0)
  used_BGN = config.used(thoughts, decoder.stop)
  nothing = jnp.zeros(outcome_BGN.shape)
  policy_logp_BGN, entropy_BGN, token_logp_BGNJ, chosen_BGNJ = policy or (nothing, nothing, None, None)
  return Trace(
    logp_BGT=logp_BGT,
    hit_BGT=hit_BGT,
    weights_BT=batch.weights_BT,
    base_logp_BT=None,
    ahead_logp_BGNA=None,
    ahead_weights_BNA=None,
    outcome_BGN=only(outcome_BGN),
    policy_logp_BGN=only(policy_logp_BGN),
    entropy_BGN=only(entropy_BGN),
    token_logp_BGNJ=None if policy is None else jnp.where(valid_BGN[..., None], token_logp_BGNJ, 0.0),
    chosen_BGNJ=None if policy is None else chosen_BGNJ & valid_BGN[..., None],
    valid_BN=valid_BN,
    used_BGN=jnp.where(valid_BGN, used_BGN, 0),
    thoughts=jax.lax.stop_gradient(thoughts),
    dropped_B=layout.dropped_B,
    exit_length_K=jnp.asarray(halting.exits(config)) if config.learns_end else None,
  )


def _gather(values_BSD, index_BX):
  """values_BSD[b, index_BX[b, x]]; indices out of range read the last slot (what comes of them is masked)."""
  return jnp.take_along_axis(values_BSD, jnp.minimum(index_BX, values_BSD.shape[1] - 1)[..., None], axis=1)
