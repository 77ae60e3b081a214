"""Every thought of a tiny vocabulary, put through the rollout: exact bounds, and what an objective's gradient expects.

A pair of thoughts (G = 2) is a row; a row's probability is that of its thoughts. The loss of every row is the
objective's own, on a Trace made by the rollout.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import problem
from tests.objectives.reversible import probability, reversible, through
from tests.slow import leaving
from thinking_lm.model.decoder import Model, ModelConfig
from thinking_lm.model.rollout import rollout
from thinking_lm.objectives.advantages import ADVANTAGES, Advantage
from thinking_lm.objectives.baselines import BASELINES, reward_of
from thinking_lm.objectives.objective import ObjectiveConfig, objective
from thinking_lm.objectives.policy import ESTIMATORS, KL_LIMIT
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Batch, Beside, Thoughts

V, T = 3, 3
MODEL = Model(ModelConfig(layers=2, width=8, heads=2, kv_heads=1, mlp_width=12), V, heads=("value", "mix"))
FIELDS = ("logp_BGT", "ahead_logp_BGNA", "outcome_BGN", "policy_logp_BGN", "entropy_BGN", "token_logp_BGNJ")

# Topology, look-ahead, think tokens, anchors, halting, and mixing if there is any: V^(tokens x anchors) = 9 thoughts of
# a row, 81 pairs; of those that may stop 1 + 3 + 9, 169 pairs.
CASES = dict(
  private=("private", 1, 2, [1], "fixed"),
  ahead=("private", 2, 1, [0, 1], "fixed"),
  persistent=("persistent", 0, 1, [0, 1], "fixed"),
  short=("persistent", 1, 1, [0, 1], "fixed"),
  stop=("private", 1, 2, [1], "stop"),
  mixed=("private", 2, 1, [0, 1], "fixed", "probability"),
)


@functools.cache
def params():
  return problem.moved(MODEL, 0.6)


STOP = MODEL.bind(params()).stop


def enumerated(case, G):
  """(trace, pull, beside) of a batch that has every tuple of G thoughts as a row.

  pull: cotangents of FIELDS -> gradient, one vector. beside: with the thoughts under another policy, and where their
  length is fixed with the log-probability after the greedy thoughts of each row.
  """
  topology, lookahead, n, anchors, halting, *mixing = CASES[case]
  config = ThoughtConfig(
    **dict(kind="sampled", length=n, topology=topology, lookahead=lookahead, samples=G, temperature=0.8),
    **dict(rotary="advance", halting=halting, mixing=mixing[0] if mixing else "none"),
  )
  N, words = len(anchors), [*range(V), *[STOP] * (halting == "stop")]
  one = [z for z in itertools.product(words, repeat=N * n) if STOP not in z[:-1] or set(z[z.index(STOP) :]) == {STOP}]
  one = np.array(one).reshape(-1, N, n)
  tuples = np.array(list(itertools.product(range(len(one)), repeat=G)))
  tokens_BGNJ, B = one[tuples], len(tuples)
  tile = lambda row, kind: np.tile(np.array(row, kind), (B, 1))
  batch = Batch(
    *(tile([2, 0, 1], np.int32), tile([1, 2, 0], np.int32), tile([1.0, 0.5, 2.0], np.float32)),
    *(tile([1] * T, np.int32), tile(range(T), np.int32), np.arange(B, dtype=np.uint32)),
  )
  layout = problem.layout([anchors] * B, block=1, T=T)

  def run(params):
    given = Thoughts(MODEL.bind(params).embed(tokens_BGNJ), jnp.asarray(tokens_BGNJ))
    trace = rollout(MODEL, config, params, batch, layout, jax.random.key(0), given)
    return {name: getattr(trace, name) for name in FIELDS}, trace

  def greedy(params):
    one = dataclasses.replace(config, temperature=0.0, samples=1)
    return rollout(MODEL, one, params, batch, layout, jax.random.key(1))

  traced, pull = reversible(run, params())
  reference = jax.tree.map(lambda leaf: 0.8 * leaf, params())
  beside = Beside(reference_logp_BGNJ=traced(reference).token_logp_BGNJ)
  if halting == "fixed":
    beside = beside.replace(greedy_reward_BN=jax.jit(greedy)(params()).outcome_BGN[:, 0])
  return traced(params()), pull, beside


@functools.cache
def exact(case, bound="J", price=0.0):
  """The gradient of a bound less the price of its thoughts, as one vector; of M, that of E L for pairs."""
  return pulled(case, lambda trace: jnp.sum(probability(trace) * value(case, bound, price, trace)))


def pulled(case, of, G=2):
  """The gradient of a function of the trace of all tuples, as one vector."""
  trace, pull, _ = groups(case, G)
  return through(trace, pull, FIELDS, of)


def value(case, bound, price, trace):
  """What each row's thoughts are worth by the definition of a bound, [B], differentiable.

  Persistent thoughts change all targets together (there are none before the first), private ones those that they see.
  """
  topology, _, _, anchors, *_ = CASES[case]
  logs_BGT = trace.logp_BGT * trace.weights_BT[:, None]
  if topology == "persistent":
    units_BGU, free = logs_BGT.sum(axis=2, keepdims=True), []
  else:
    units_BGU, free = logs_BGT[:, :, jnp.array(anchors)], [t for t in range(T) if t not in anchors]
  if trace.ahead_logp_BGNA is not None:
    units_BGU += jnp.sum(trace.ahead_logp_BGNA * trace.ahead_weights_BNA[:, None], axis=3)
  mean = dict(
    J=lambda logs_BGU: logs_BGU.mean(axis=1),
    M=lambda logs_BGU: jnp.log(jnp.exp(logs_BGU).mean(axis=1)),
    P=lambda logs_BGU: jnp.exp(logs_BGU).mean(axis=1),
  )[bound]
  used_BG = jnp.sum(trace.thoughts.tokens_BGNJ != STOP, axis=(2, 3))
  return mean(units_BGU).sum(axis=1) + logs_BGT[:, 0, jnp.array(free, int)].sum(axis=1) - price * used_BG.mean(axis=1)


@functools.cache
def groups(case, G):
  return enumerated(case, G)


EXTRA = dict(reward_mean=dict(total=jnp.float32(-0.9), weight=jnp.float32(0.5)))
"""Earlier rewards of mean -1.8."""


def expected(case, config, G=2):
  """Trace of all tuples of G thoughts -> the loss that is expected of the policy at hand."""
  trace, _, beside = groups(case, G)
  probability_B = probability(trace)
  np.testing.assert_allclose(probability_B.sum(), 1, rtol=1e-5)
  row = lambda *one: objective(config, *jax.tree.map(lambda leaf: leaf[None], one), EXTRA)[0]
  return lambda trace: jnp.sum(probability_B * jax.vmap(row)(trace, beside))


def expectation(case, config, G=2):
  """The expected gradient of an objective over all tuples of G thoughts, as one vector."""
  return pulled(case, expected(case, config, G), G)


def gap(case, config, G=2):
  """How far the gradient of -(the bound - the price) is from what is expected of the loss, relative to its size."""
  gradient = exact(case, config.bound, config.price)
  return np.linalg.norm(expectation(case, config, G) + gradient) / np.linalg.norm(gradient)


TOLERANCE, CLEAR = 1e-4, 1e-2
"""Relative gaps: float32 rounding is below the first, a bias that matters above the second."""


def near(got, wanted):
  """Whether two gradients are the same; they are never nearly so."""
  error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
  assert error < TOLERANCE or error > CLEAR
  return error < TOLERANCE


HYBRID = ObjectiveConfig(nll_weight=1.0, score_weight=1.0, advantage="leave_one_out")


@pytest.mark.parametrize("case", leaving(["private", "ahead", "persistent"], ["ahead", "persistent"]))
def test_hybrid_expects_grad_J_and_nll_only_does_not(case):
  assert gap(case, HYBRID) < TOLERANCE
  assert gap(case, ObjectiveConfig(nll_weight=1.0, score_weight=0.0)) > CLEAR


def test_mixed_predictions_have_an_expectation_of_their_own():
  """Half of each prediction knows no thought, so that what is left out of its gradient counts for less."""
  assert gap("mixed", HYBRID) < TOLERANCE < 20 * TOLERANCE < gap("mixed", ObjectiveConfig(score_weight=0.0))


def test_a_persistent_thought_that_is_paid_for_one_token_only_is_biased():
  # It changes what comes later too, which lookahead 1 does not pay for.
  assert gap("short", HYBRID) > CLEAR
  assert gap("persistent", HYBRID) < TOLERANCE


@pytest.mark.parametrize("price", [0.0, 0.3])
def test_a_drawn_stop_is_paid_for_and_so_is_what_it_saves(price):
  for advantage in ("leave_one_out", "none"):
    got = -expectation("stop", dataclasses.replace(HYBRID, price=price, advantage=advantage))
    assert near(got, exact("stop", "J", price)) and not near(got, exact("stop", "J", price + 0.3))


@pytest.mark.parametrize("advantage", leaving(["vimco", "jepo"], ["vimco"]))
def test_bound_m_less_a_price_is_what_it_expects(advantage):
  config = ObjectiveConfig(score_weight=1.0, bound="M", advantage=advantage, price=0.3)
  got = -expectation("stop", config)
  assert near(got, exact("stop", "M", 0.3)) and not near(got, exact("stop", "M", 0.0))


REWARDS_OF = dict(J="log_prob", M="log_prob", P="prob")


def claim_holds(name, case="persistent", bound="J"):
  """An advantage is unbiased if and only if it says so."""
  config = ObjectiveConfig(score_weight=1.0, advantage=name, bound=bound, reward=REWARDS_OF[bound])
  return (gap(case, config) < TOLERANCE) == ADVANTAGES[name].unbiased


CREDITS = [(bound, name) for bound in "JPM" for name, one in ADVANTAGES.items() if (one.bound == "M") == (bound == "M")]


@pytest.mark.parametrize("case", ["private", "ahead", "persistent"])
@pytest.mark.parametrize(("bound", "name"), CREDITS)
def test_claims_of_an_advantage(bound, name, case):
  assert claim_holds(name, case, bound)


@pytest.mark.parametrize("name", [name for name, member in ADVANTAGES.items() if member.needs == 1])
@pytest.mark.parametrize("case", leaving(["ahead", "persistent"], ["ahead"]))
def test_claims_of_an_advantage_that_needs_no_group(case, name):
  config = ObjectiveConfig(nll_weight=1.0, score_weight=1.0, advantage=name)
  assert (gap(case, config, G=1) < TOLERANCE) == ADVANTAGES[name].unbiased


def second_moment(case, name):
  """Mean squared advantage of one thought, over all thoughts."""
  trace, _, beside = groups(case, 1)
  config = ObjectiveConfig(nll_weight=1.0, score_weight=1.0, advantage=name)
  probability_B = np.exp(np.asarray(trace.policy_logp_BGN, np.float64).sum(axis=(1, 2)))
  baseline = BASELINES[ADVANTAGES[name].baseline].of(config, trace, beside, EXTRA)
  advantage_BGN = ADVANTAGES[name].of(reward_of(config, trace, beside), baseline)
  return float((probability_B * np.square(advantage_BGN).sum(axis=(1, 2))).sum())


def test_baselines_are_what_they_say():
  trace, _, beside = groups("persistent", 1)
  rewards = np.asarray(trace.outcome_BGN, np.float64)
  for name, baseline in dict(
    ema=-1.8, value=trace.value_BGN, greedy=np.asarray(beside.greedy_reward_BN, np.float64)[:, None]
  ).items():
    probability_B = np.exp(np.asarray(trace.policy_logp_BGN, np.float64).sum(axis=(1, 2)))
    expected = (probability_B * np.square(rewards - baseline).sum(axis=(1, 2))).sum()
    np.testing.assert_allclose(second_moment("persistent", name), expected, rtol=1e-5)
  # Greedy thoughts are one way to think, the same for every row.
  (row,) = np.flatnonzero(np.isclose(trace.outcome_BGN[:, 0], beside.greedy_reward_BN[0], rtol=1e-5).all(axis=1))
  assert np.ptp(beside.greedy_reward_BN, axis=0).max() < 1e-5 and probability_B[row] > np.median(probability_B)


@pytest.mark.parametrize("case", ["ahead", "persistent"])
def test_a_value_knows_what_comes_before_its_thought_and_nothing_else(case):
  trace, _, _ = groups(case, 1)
  tokens_BN, value_BN = trace.thoughts.tokens_BGNJ[:, 0, :, 0], np.asarray(trace.value_BGN)[:, 0]
  assert np.abs(value_BN).max() > 0.1
  np.testing.assert_allclose(value_BN[:, 0], value_BN[0, 0], rtol=1e-5)
  for first in range(V):
    np.testing.assert_allclose(np.ptp(value_BN[tokens_BN[:, 0] == first, 1]), 0, atol=1e-5)
  assert (np.ptp(value_BN[:, 1]) > 1e-3) == (case == "persistent"), "a later anchor sees persistent thoughts"


@pytest.mark.parametrize(
  "of", [lambda r: r - r.mean(axis=1, keepdims=True), lambda r: jnp.maximum(r - r.mean(axis=1, keepdims=True), 0)]
)
def test_a_false_claim_is_found(monkeypatch, of):
  monkeypatch.setitem(ADVANTAGES, "false", Advantage(of, unbiased=True, needs=2))
  assert not claim_holds("false")
  monkeypatch.setitem(ADVANTAGES, "false", Advantage(of, unbiased=False, needs=2))
  assert claim_holds("false")


# Of thoughts of up to two tokens: the first may be one of V or STOP, and after one of V so may the second.


def conditionals(token_logp_BGNJ):
  """(log pi of the first token [V + 1], of the second given the first [V, V + 1])."""
  one_Z2 = token_logp_BGNJ[:: V * (V + 1) + 1, 0, 0]
  found = one_Z2[:: V + 1, 0], one_Z2[:-1, 1].reshape(V, V + 1)
  for logp in found:
    np.testing.assert_allclose(jnp.exp(jax.lax.stop_gradient(logp)).sum(axis=-1), 1, rtol=1e-5)
  return found


def reverse(logp, reference):
  """KL(pi || pi_ref) of one token."""
  return jnp.sum(jnp.exp(logp) * (logp - reference), axis=-1)


KL = dict(reverse=reverse, forward=lambda logp, reference: reverse(reference, logp))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_claims_of_a_divergence_of_two_tokens(name):
  """Each token's, given those before it: that a first token leads to where the policies differ is not charged."""
  trace, _, beside = groups("stop", 2)
  config = ObjectiveConfig(nll_weight=0.0, kl_weight=1.0, kl_estimator=name)
  assert float(jnp.max(beside.reference_logp_BGNJ - trace.token_logp_BGNJ)) < KL_LIMIT
  reference = conditionals(beside.reference_logp_BGNJ)

  def divergence(trace, direction, charged):
    first, second = conditionals(trace.token_logp_BGNJ)
    before = jnp.exp(first[:V] if charged else jax.lax.stop_gradient(first[:V]))
    return KL[direction](first, reference[0]) + jnp.sum(before * KL[direction](second, reference[1]))

  value = float(expected("stop", config)(trace))
  assert np.isclose(value, divergence(trace, "reverse", True), rtol=1e-4) == ESTIMATORS[name].unbiased
  got = expectation("stop", config)
  for direction in KL:
    of = functools.partial(divergence, direction=direction)
    assert near(got, pulled("stop", functools.partial(of, charged=False))) == (direction == ESTIMATORS[name].gradient)
    assert not near(got, pulled("stop", functools.partial(of, charged=True)))


def test_an_entropy_bonus_of_two_tokens_is_their_mean_and_charges_no_prefix():
  def bonus(trace, charged):
    first, second = conditionals(trace.token_logp_BGNJ)
    entropy, entropy_V = (-jnp.sum(jnp.exp(logp) * logp, axis=-1) for logp in (first, second))
    drawn = jnp.exp(first if charged else jax.lax.stop_gradient(first))
    return drawn[V] * entropy + jnp.sum(drawn[:V] * (entropy + entropy_V) / 2)

  got = -expectation("stop", ObjectiveConfig(nll_weight=0.0, entropy_weight=1.0))
  assert near(got, pulled("stop", functools.partial(bonus, charged=False)))
  assert not near(got, pulled("stop", functools.partial(bonus, charged=True)))
