"""The health of thoughts: signs that every trace shows, and the rules by which a run's numbers raise an alarm.

A sign is a pure function of a Trace, logged in every step. What needs more than a trace (effect of thoughts, mismatch
of sampler and learner, gradient norms) is examined every so many steps by `evaluation/health.py`. A rule reads numbers
by name, from either, and knows what to do about them; `training/alarms.py` follows it through a run. To add a sign or a
rule, write the function and its line in the table. Defaults of the thresholds are proposals, not measurements.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from thinking_lm.config import option
from thinking_lm.metrics import Mean
from thinking_lm.thoughts.halting import HALTING
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Trace


@dataclasses.dataclass(frozen=True)
class HealthConfig:
  """Thresholds of the alarms (0 switches a rule off), and how often thoughts are examined."""

  every: int = option(
    200, "steps between examinations of the first rows of evaluation.split, as many as a micro-batch; 0: none", low=0
  )
  patience: int = option(3, "readings in a row beyond a threshold before an alarm", low=1)
  entropy_low: float = option(0.3, "warn: entropy of thoughts falls below this share of the first reading", low=0)
  entropy_high: float = option(1.5, "warn: entropy of thoughts rises above so many times the first reading", low=0)
  entropy_uniform: float = option(0.9, "warn: entropy of thoughts above this share of ln(vocabulary)", low=0, high=1)
  entropy_stop: float = option(
    0.0,
    "stop the run: entropy below this share of the first reading; 0: never, since what was learned may be sure",
    low=0,
    high=1,
  )
  entropy_place: float = option(
    0.1, "warn: least entropy of the first, second, ... think token, below this share of the first reading", low=0
  )
  empty: float = option(0.8, "warn: share of thoughts that end before their first token", low=0, high=1)
  full: float = option(0.5, "warn: share of thoughts that never end by themselves", low=0, high=1)
  repeated: float = option(0.9, "warn: share of think tokens that repeat the one before", low=0, high=1)
  looped: float = option(
    0.7, "warn: share of pairs of successive think tokens that stood in the same thought before", low=0, high=1
  )
  distinct: float = option(
    0.1, "warn: different thoughts of a group beyond the first, as a share of the most there can be", low=0, high=1
  )
  rank: float = option(
    0.5, "warn: effective dimensions of thoughts fall below; only equal ones have less than 1", low=0
  )
  scale: float = option(
    5.0,
    "warn: inputs of continuous think tokens are so many times larger or smaller than embeddings at the start",
    low=0,
  )
  alike: float = option(0.999, "warn: cosine of successive continuous thoughts", low=0, high=1)
  flat: float = option(0.9, "warn: share of groups whose samples are all paid the same", low=0, high=1)
  lengthy: float = option(0.9, "warn: correlation of think tokens and reward within a group", low=0, high=1)
  drift: float = option(10.0, "warn: KL to the reference above so many times its median so far", low=0)
  leap: float = option(10.0, "warn: KL made by one step's updates above so many times its median so far", low=0)
  clipped: float = option(0.25, "warn: share of importance ratios whose gradient the clip takes away", low=0, high=1)
  gradients: float = option(1e3, "warn: one term's gradient norm is so many times the other's", low=0)
  chain: float = option(
    1e3, "warn: gradients at one end of a chain of think tokens are so many times the other's", low=0
  )
  mismatch: float = option(0.0, "warn: sampler and learner differ by so many nats; 0: 1e-4, or 0.05 in bfloat16", low=0)
  ratio: float = option(
    0.01, "warn: the learner's probability of a drawn token over the sampler's is so far from 1 on average", low=0
  )
  snr: float = option(0.0, "warn: signal to noise of the policy's gradient below this (0: off)", low=0)
  effect: bool = option(True, "warn: the reward rises and thoughts have no effect on the prediction")
  content: float = option(
    0.1,
    "warn: share of what thoughts gain that is lost with another sequence's thoughts, or pauses, in their place",
    low=0,
    high=1,
  )


def _pairs(trace, thought):
  """(each think token but the first, or each thought but a row's first if they are of one token; the ones before; which
  of them exist), along the axis of either.
  """
  inputs, tokens = trace.thoughts.inputs_BGNJD, trace.thoughts.tokens_BGNJ
  if thought.length > 1:
    there = jnp.arange(thought.length) < trace.used_BGN[..., None]
    return (inputs[..., 1:, :], tokens[..., 1:]), (inputs[..., :-1, :], tokens[..., :-1]), there[..., 1:]
  there = jnp.broadcast_to(trace.valid_BN[:, None, 1:, None], tokens[:, :, 1:].shape)
  return (inputs[:, :, 1:], tokens[:, :, 1:]), (inputs[:, :, :-1], tokens[:, :, :-1]), there


def _ended(trace, length: int, k: int):
  """Which thoughts ended after so many think tokens, [B, G, N]; where a head says so, the probability of exit k."""
  if trace.exit_logp_BGNK is None:
    return trace.used_BGN == length
  return jnp.exp(trace.exit_logp_BGNK[..., k])


def empty_thoughts(trace, thought) -> Mean:
  """Share of thoughts that ended before their first token."""
  del thought
  return Mean.of(_ended(trace, 0, k=0), trace.valid_BN[:, None])


def full_thoughts(trace, thought) -> Mean:
  """Share of thoughts that used all their tokens and did not end by themselves."""
  return Mean.of(_ended(trace, thought.length, k=-1), trace.valid_BN[:, None])


def repeated_tokens(trace, thought) -> Mean:
  """Share of think tokens that are the token before, within a thought; of one-token thoughts, the thought before."""
  (_, after), (_, before), there = _pairs(trace, thought)
  return Mean.of(after == before, there)


def repeated_pairs(trace, thought) -> Mean:
  """Share of a thought's pairs of successive tokens, but the first, that stood in it before: 3 / 4 of "ababab"."""
  tokens_BGNJ, place_J = trace.thoughts.tokens_BGNJ, jnp.arange(thought.length - 1)
  there_BGNJ = place_J + 1 < trace.used_BGN[..., None]
  left_BGNJ = jnp.where(there_BGNJ, tokens_BGNJ[..., :-1], -2 - place_J)  # what is not there is like nothing else
  left_BGNJ, right_BGNJ = jax.lax.sort((left_BGNJ, tokens_BGNJ[..., 1:]), num_keys=2)
  again_BGNJ = jnp.all(jnp.stack([a[..., 1:] == a[..., :-1] for a in (left_BGNJ, right_BGNJ)]), axis=0)
  return Mean(jnp.sum(again_BGNJ.astype(jnp.float32)), jnp.sum(there_BGNJ[..., 1:].astype(jnp.float32)))


def distinct_thoughts(trace, thought) -> Mean:
  """Different thoughts of a group / G: 1 / G when all samples are the same. What is behind a STOP does not count."""
  there = jnp.arange(thought.length) < trace.used_BGN[..., None]
  tokens_BGNJ = jnp.where(there, trace.thoughts.tokens_BGNJ, -1)
  same_BGGN = jnp.all(tokens_BGNJ[:, :, None] == tokens_BGNJ[:, None], axis=-1)
  earlier_GG = jnp.tril(jnp.ones(same_BGGN.shape[1:3], bool), -1)
  new_BGN = ~jnp.any(same_BGGN & earlier_GG[:, :, None], axis=2)
  return Mean.of(new_BGN, trace.valid_BN[:, None])


def thought_scale(trace, thought) -> Mean:
  """Root mean square of a think token's input; that of an embedding at initialisation is 1."""
  there = (jnp.arange(thought.length) < trace.used_BGN[..., None]) & trace.valid_BN[:, None, :, None]
  return Mean.of(_rms(trace.thoughts.inputs_BGNJD), there)


def successive_cosine(trace, thought) -> Mean:
  """Cosine of successive think tokens' inputs, within a thought; of one-token thoughts, of successive thoughts."""
  (after, _), (before, _), there = _pairs(trace, thought)
  cosine = jnp.mean(after * before, axis=-1) / jnp.maximum(_rms(after) * _rms(before), 1e-30)
  return Mean.of(cosine, there)


def _rms(x):
  return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1))


class Sign(NamedTuple):
  """of: (trace, thought) -> Mean. needs: ThoughtConfig -> bool, whether it says anything about such thoughts."""

  of: Callable[[Trace, ThoughtConfig], Mean]
  needs: Callable[[ThoughtConfig], bool]


DRAWN, CONTINUOUS = ("gumbel", "sampled"), ("latent", "soft", "noisy")
"""Kinds whose think tokens are ids, and those whose inputs vary where the likeliest token of each may not."""

LONG = 6
"""Think tokens from which on a thought is long enough to go round in circles."""

SIGNS = dict(
  empty_thoughts=Sign(empty_thoughts, lambda thought: thought.may_end),
  full_thoughts=Sign(full_thoughts, lambda thought: thought.may_end and not HALTING[thought.halting].once),
  repeated_tokens=Sign(repeated_tokens, lambda thought: thought.kind in DRAWN),
  repeated_pairs=Sign(repeated_pairs, lambda thought: thought.kind in DRAWN and thought.length >= LONG),
  distinct_thoughts=Sign(distinct_thoughts, lambda thought: thought.kind in DRAWN and thought.samples > 1),
  thought_scale=Sign(thought_scale, lambda thought: thought.kind in CONTINUOUS),
  successive_cosine=Sign(successive_cosine, lambda thought: thought.kind in CONTINUOUS),
)


def signs(trace: Trace, thought: ThoughtConfig) -> dict[str, Mean]:
  """What SIGNS say about a trace, without gradients; nothing where there are no thoughts."""
  if not thought.length or not trace.valid_BN.shape[1]:
    return {}
  trace = jax.lax.stop_gradient(trace)
  return {name: sign.of(trace, thought) for name, sign in SIGNS.items() if sign.needs(thought)}


class History(NamedTuple):
  """The readings of one number so far: the first one, and the latest ones (at most 100), oldest first."""

  first: float
  recent: tuple[float, ...]

  @property
  def last(self) -> float:
    """The newest reading."""
    return self.recent[-1]


def value(name: str):
  """A measure: the newest reading of `name`."""
  return lambda histories: histories[name].last


def of_first(name: str):
  """A measure: the newest reading as a multiple of the first one."""
  return lambda histories: histories[name].last / max(abs(histories[name].first), 1e-12)


def of_median(name: str):
  """A measure: the newest reading as a multiple of the median of those before it; 1 while there are fewer than ten."""

  def measure(histories):
    *before, last = histories[name].recent
    return last / max(sorted(before)[len(before) // 2], 1e-12) if len(before) >= 10 else 1.0

  return measure


def imbalance(left: str, right: str):
  """A measure: the larger of two positive readings as a multiple of the smaller one."""

  def measure(histories):
    a, b = histories[left].last, histories[right].last
    return max(a, b) / max(min(a, b), 1e-30)

  return measure


def gain_without_effect(histories):
  """How much the reward rose since the first reading while thoughts have no effect; 0 where they have one.

  The effect of thoughts is what it costs to leave them out, in nats per target. A reward that rises all the same is
  earned by something else than thinking.
  """
  if histories["effect_none"].last > 0:
    return 0.0
  return histories["reward"].last - histories["reward"].first


CONTENT = ("effect_none", "effect_shuffled", "effect_pause")
"""What `content` reads."""

GAIN = 0.01
"""Nats per target that thoughts must be worth before it is asked what in them is."""


def content(histories):
  """The share of what thoughts are worth that is lost where other ones take their place, of another sequence or empty,
  whichever loses less; 1 while they are worth less than GAIN.
  """
  worth = histories["effect_none"].last
  lost = min(histories[name].last for name in CONTENT[1:])
  return 1.0 if worth < GAIN else lost / worth


class Rule(NamedTuple):
  """An alarm waiting to be raised.

  reads: names of the numbers that `measure` looks at; the rule is silent until all of them have been read.
  measure: {name: History} -> float. low, high: what it must not fall below or rise above; None is no bound.
  advice: what it means and what to do about it. stops: the run ends, instead of a warning.
  """

  reads: tuple[str, ...]
  measure: Callable[[dict[str, History]], float]
  low: float | None
  high: float | None
  advice: str
  stops: bool = False

  def broken(self, measured: float) -> bool:
    """Whether this measurement is beyond a bound, or is no number."""
    below = self.low is not None and measured < self.low
    above = self.high is not None and measured > self.high
    return below or above or math.isnan(measured)


def _above(bound, name, advice, measure=value) -> Rule:
  return Rule((name,), measure(name), None, bound or None, advice)


def _below(bound, name, advice, measure=of_first, stops=False) -> Rule:
  return Rule((name,), measure(name), bound or None, None, advice, stops)


def _balanced(bound, left, right, advice) -> Rule:
  return Rule((left, right), imbalance(left, right), None, bound or None, advice)


def rules(
  config: HealthConfig, vocabulary_size: int, half_precision: bool, tokens: bool = True, samples: int = 1
) -> dict[str, Rule]:
  """The rules that the thresholds switch on, by name; those about entropy where a policy draws tokens (noise of a
  constant scale has a constant one).

  The failures are those that runs of others ended in: entropy collapse and explosion, thoughts that grow to the cap or
  vanish, drift from the reference, groups without a signal or of one thought, a sampler whose probabilities are not the
  learner's, reward without an effect, gains without content, repetition, one gradient drowning the other, and latents
  that stand still. samples: thoughts of a group, G.
  """
  c, entropy, lowest = config, "think_entropy", "think_entropy_lowest"
  mismatch = c.mismatch or (0.05 if half_precision else 1e-4)
  uniform = c.entropy_uniform * math.log(vocabulary_size)
  around = (1 - c.ratio, 1 + c.ratio) if c.ratio else (None, None)
  sizes = (1 / c.scale, c.scale) if c.scale else (None, None)
  distinct = c.distinct and (1 + c.distinct * (samples - 1)) / samples
  cure = "raise objective.entropy_weight, or lower the learning rate"
  fading = "gradients explode or vanish from think token to think token: shorten thoughts, or lower rates"
  unearned = "the reward rises, and not by thinking better"
  hollow = "it is not what is thought that helps: compare with kind pause"
  table = dict(
    entropy_low=_below(c.entropy_low, entropy, f"thoughts become all the same: {cure}"),
    entropy_high=_above(c.entropy_high, entropy, "thoughts become noise: lower rates", of_first),
    entropy_uniform=_above(uniform, entropy, "thoughts are nearly uniform noise"),
    entropy_stop=_below(c.entropy_stop, entropy, f"entropy collapsed: {cure}", stops=True),
    empty=_above(c.empty, "empty_thoughts", "thinking does not pay: lower objective.price"),
    full=_above(c.full, "full_thoughts", "thoughts hit the cap: raise the price"),
    lengthy=_above(c.lengthy, "length_reward", "thoughts are paid for length: raise the price"),
    repeated=_above(c.repeated, "repeated_tokens", "one token is repeated"),
    looped=_above(c.looped, "repeated_pairs", "thoughts go round in circles"),
    distinct=_below(distinct, "distinct_thoughts", f"a group has one thought: {cure}", value),
    rank=_below(c.rank, "thought_rank", "all thoughts are the same, or there are none", value),
    scale=Rule(("thought_scale",), value("thought_scale"), *sizes, "thoughts are out of the scale of embeddings"),
    alike=_above(c.alike, "successive_cosine", "thoughts stand still"),
    flat=_above(c.flat, "flat_groups", "no signal: thoughts change nothing yet"),
    drift=_above(c.drift, "kl", "the policy jumps away from its reference", of_median),
    leap=_above(c.leap, "approx_kl", "the policy jumps within a step: fewer updates, or lower rates", of_median),
    clipped=_above(c.clipped, "clip_fraction", "most of the gradient is clipped: fewer updates, or lower rates"),
    gradients=_balanced(
      c.gradients, "nll_grad_norm", "score_grad_norm", "one term drowns the other: change objective.score_weight"
    ),
    chain=_balanced(c.chain, "chain_grad_first", "chain_grad_last", fading),
    entropy_place=_below(c.entropy_place, lowest, f"one think token is always the same: {cure}"),
    ratio=Rule(("sampler_ratio",), value("sampler_ratio"), *around, "drawn thoughts are scored as other ones"),
    snr=_below(c.snr, "score_grad_snr", "the policy's gradient is noise: more samples, or larger batches", value),
    mismatch=_above(mismatch, "sampler_mismatch", "drawn thoughts are scored as other ones"),
    effect=Rule(("effect_none", "reward"), gain_without_effect, None, 0.0 if c.effect else None, unearned),
    content=Rule(CONTENT, content, c.content or None, None, hollow),
  )
  bounded = {name: rule for name, rule in table.items() if (rule.low, rule.high) != (None, None)}
  return {name: rule for name, rule in bounded.items() if tokens or rule.reads[0] not in (entropy, lowest)}
