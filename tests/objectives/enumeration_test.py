"""Every thought of a tiny vocabulary, put through the rollout: the exact J, and what an objective's gradient expects.

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
from thinking_lm.model.decoder import Model, ModelConfig
from thinking_lm.model.rollout import rollout
from thinking_lm.objectives.advantages import ADVANTAGES, Advantage
from thinking_lm.objectives.baselines import BASELINES, reward_of
from thinking_lm.objectives.objective import ObjectiveConfig, objective
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Batch, Beside, Thoughts

V, T = 3, 3
MODEL = Model(ModelConfig(layers=2, width=8, heads=2, kv_heads=1, mlp_width=12), V, heads=("value",))
FIELDS = ("logp_BGT", "ahead_logp_BGNA", "outcome_BGN", "policy_logp_BGN")

# Topology, look-ahead, think tokens, anchors: V^(tokens x anchors) = 9 thoughts of a row, 81 pairs.
CASES = dict(
  private=("private", 1, 2, [1]),
  ahead=("private", 2, 1, [0, 1]),
  persistent=("persistent", 0, 1, [0, 1]),
  short=("persistent", 1, 1, [0, 1]),
)


@functools.cache
def params():
  return problem.moved(MODEL, 0.6)


def enumerated(case, G):
  """(trace, pull, beside) of a batch that has every tuple of G thoughts as a row.

  pull: cotangents of FIELDS -> gradient. beside: with the log-probability after the greedy thoughts of each row.
  """
  topology, lookahead, n, anchors = CASES[case]
  config = ThoughtConfig(
    kind="sampled", length=n, topology=topology, lookahead=lookahead, samples=G, temperature=0.8, rotary="advance"
  )
  N = len(anchors)
  one = np.array(list(itertools.product(range(V), repeat=N * n))).reshape(-1, N, n)
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

  def vjp(params, cotangents):
    return jax.vjp(lambda p: run(p)[0], params)[1](cotangents)[0]

  compiled = lambda function: jax.jit(function)
  beside = Beside(greedy_reward_BN=compiled(greedy)(params()).outcome_BGN[:, 0])
  return compiled(run)(params())[1], functools.partial(compiled(vjp), params()), beside


@functools.cache
def exact(case):
  """grad J as one vector."""
  trace, pull, _ = groups(case, 1)
  np.testing.assert_allclose(np.exp(trace.policy_logp_BGN.sum(axis=(1, 2))).sum(), 1, rtol=1e-5)
  return flat(pull(jax.grad(J)({name: getattr(trace, name) for name in FIELDS}, trace)))


def J(fields, trace):
  """sum over thoughts z of pi(z) (weighted log-probabilities of all targets given z), differentiable."""
  t = trace.replace(**fields)
  value_B = jnp.sum(t.logp_BGT[:, 0] * t.weights_BT, axis=1)
  if t.ahead_logp_BGNA is not None:
    value_B += jnp.sum(t.ahead_logp_BGNA[:, 0] * t.ahead_weights_BNA, axis=(1, 2))
  return jnp.sum(jnp.exp(t.policy_logp_BGN[:, 0].sum(axis=1)) * value_B)


@functools.cache
def groups(case, G):
  return enumerated(case, G)


EXTRA = dict(reward_mean=dict(total=jnp.float32(-0.9), weight=jnp.float32(0.5)))
"""Earlier rewards of mean -1.8."""


def flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


def expectation(case, config, G=2):
  """The expected gradient of an objective over all tuples of G thoughts, as one vector."""
  trace, pull, beside = groups(case, G)
  probability_B = np.exp(np.asarray(trace.policy_logp_BGN, np.float64).sum(axis=(1, 2)))
  np.testing.assert_allclose(probability_B.sum(), 1, rtol=1e-5)

  def loss(fields):
    row = lambda *one: objective(config, *jax.tree.map(lambda leaf: leaf[None], one), EXTRA)[0]
    return jnp.sum(jnp.asarray(probability_B, jnp.float32) * jax.vmap(row)(trace.replace(**fields), beside))

  return flat(pull(jax.grad(loss)({name: getattr(trace, name) for name in FIELDS})))


def gap(case, config, G=2):
  """How far -grad J is from the expected gradient of the loss, relative to its size."""
  gradient = exact(case)
  return np.linalg.norm(expectation(case, config, G) + gradient) / np.linalg.norm(gradient)


TOLERANCE, CLEAR = 1e-4, 1e-2
"""Relative gaps: float32 rounding is below the first, a bias that matters above the second."""

HYBRID = ObjectiveConfig(nll_weight=1.0, score_weight=1.0, advantage="leave_one_out")


@pytest.mark.parametrize("case", ["private", "ahead", "persistent"])
def test_hybrid_expects_grad_J_and_nll_only_does_not(case):
  assert gap(case, HYBRID) < TOLERANCE
  assert gap(case, ObjectiveConfig(nll_weight=1.0, score_weight=0.0)) > CLEAR


def test_a_persistent_thought_that_is_paid_for_one_token_only_is_biased():
  # It changes what comes later too, which lookahead 1 does not pay for.
  assert gap("short", HYBRID) > CLEAR
  assert gap("persistent", HYBRID) < TOLERANCE


def claim_holds(name, case="persistent"):
  """An advantage is unbiased if and only if it says so."""
  config = ObjectiveConfig(nll_weight=1.0, score_weight=1.0, advantage=name)
  return (gap(case, config) < TOLERANCE) == ADVANTAGES[name].unbiased


@pytest.mark.parametrize("name", [name for name, member in ADVANTAGES.items() if not getattr(member, "bound", None)])
def test_claims_of_an_advantage_for_J(name):
  assert claim_holds(name)


@pytest.mark.parametrize("name", [name for name, member in ADVANTAGES.items() if member.needs == 1])
@pytest.mark.parametrize("case", ["ahead", "persistent"])
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
