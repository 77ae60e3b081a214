"""Scoring rules: what is said becomes a distribution, and only an honest one is best where a rule claims so."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from thinking_lm.objectives.scores import CLIP, SCORES, Spoken, distribution, happened, score
from thinking_lm.types import Report

RNG = np.random.default_rng(0)
EIGHTHS = np.array([p for p in itertools.product(range(9), repeat=3) if sum(p) == 8]) / 8
"""Every distribution over three classes in steps of 1/8."""

SIZES = np.array([1, 1, 4])
"""Two named tokens and four others: a vocabulary of 6."""


def expected(name, q_XZ, p_Z, sizes=SIZES):
  """Expected score of reports q when the classes have probabilities p, in float64."""
  with jax.enable_x64(True):
    spoken = Spoken(jnp.asarray(q_XZ), jnp.broadcast_to(jnp.asarray(sizes, float), q_XZ.shape))
    each = [SCORES[name].of(spoken, jnp.broadcast_to(hit, q_XZ.shape)) for hit in np.eye(len(p_Z), dtype=bool)]
    return np.asarray(sum(p * one for p, one in zip(p_Z, each, strict=True) if p))


def margin(name, p_Z):
  """How much the honest report is worth more than the best other one in steps of 1/8 (p is one of these)."""
  value_X = expected(name, EIGHTHS, p_Z)
  honest_X = (p_Z == EIGHTHS).all(axis=1)
  assert honest_X.sum() == 1
  return float(value_X[honest_X][0] - value_X[~honest_X].max())


@pytest.mark.parametrize("name", SCORES)
def test_claims_of_strict_properness_on_the_whole_simplex(name):
  floor = SCORES[name].floor
  margins = [margin(name, p) for p in EIGHTHS if floor is None or p.min() >= floor]
  assert (min(margins) > 1e-6) == (floor is not None), "a strictly proper rule has one best report, the true one"


@pytest.mark.parametrize("name", SCORES)
def test_properness_at_random_probabilities_and_small_lies(name):
  """Any direction away from the truth costs, to second order: a grid could hide a best report between its points."""
  floor = SCORES[name].floor
  lowest = 0.02 if floor is None else max(2 * floor, 0.02)
  gains = []
  for p_Z in (1 - 3 * lowest) * RNG.dirichlet(np.ones(3), 20) + lowest:
    lies_XZ = RNG.normal(size=(50, 3))
    lies_XZ -= lies_XZ.mean(axis=1, keepdims=True)
    lies_XZ *= 0.5 * lowest / np.abs(lies_XZ).max(axis=1, keepdims=True)
    told_X = expected(name, np.concatenate([p_Z[None], p_Z + lies_XZ]), p_Z)
    gains.append((told_X[1:] - told_X[0]).max())
  assert (max(gains) < -1e-9) == (floor is not None)


def test_the_clip_is_where_the_logarithm_stops_being_proper():
  rare = np.array([CLIP / 2, 1 - CLIP / 2, 0.0])
  reports = np.array([[q, 1 - q, 0.0] for q in (0.0, CLIP / 4, CLIP / 2, 2 * CLIP)])
  value = expected("clipped_log", reports, rare, sizes=[1, 1, 0])
  np.testing.assert_allclose(value[:2], value[0], rtol=1e-3)
  assert value[:3].max() - value[:3].min() < 1e-4 < value[2] - value[3]
  assert np.isfinite(expected("clipped_log", np.eye(3), np.ones(3) / 3)).all()


@pytest.mark.parametrize("name", [name for name, rule in SCORES.items() if rule.floor is not None])
def test_naming_what_never_comes_is_not_a_way_to_be_right(name):
  """A vacuous report is worth what a uniform one is; naming the most likely tokens is worth most."""
  p_V = np.array([0.5, 0.3, 0.1, *[0.1 / 15] * 15, 0.0, 0.0])

  def worth(names):
    truth_Z = np.append(p_V[list(names)], 1 - p_V[list(names)].sum())
    return expected(name, truth_Z[None], truth_Z, sizes=[1, 1, len(p_V) - 2])[0]

  values = {names: worth(names) for names in itertools.combinations((0, 1, 2, 3, 18, 19), 2)}
  assert max(values, key=values.get) == (0, 1)
  assert values[18, 19] < min(values[0, other] for other in (1, 2, 3, 18, 19))
  uniform = expected(name, np.array([[0.0, 0.0, 1.0]]), np.array([0.0, 0.0, 1.0]), sizes=[1, 1, 18])[0]
  np.testing.assert_allclose(values[18, 19], uniform, rtol=1e-9)


def by_hand(pairs, V):
  """Probability of every token, by the rules in words."""
  said = {}
  for token, confidence in pairs:
    said[token] = confidence
  total = sum(said.values())
  if len(said) == V:
    return [said[v] / total if total else 1 / V for v in range(V)]
  scale = max(total, 1)
  return [said[v] / scale if v in said else (1 - total / scale) / (V - len(said)) for v in range(V)]


SAID = [
  [(0, 0.7), (1, 0.2), (2, 0.0)],
  [(0, 0.7), (0, 0.2), (2, 0.1)],  # the last mention counts
  [(0, 1.0), (1, 1.0), (2, 1.0)],  # more than there is
  [(3, 0.9), (1, 0.9), (3, 0.3)],
  [(0, 0.0), (1, 0.0), (1, 0.0)],  # nothing at all
  [(0, 1.0), (0, 1.0), (0, 1.0)],
]


@pytest.mark.parametrize("V", [3, 4, 7])
def test_what_is_said_becomes_a_distribution(V):
  said = [[(token % V, confidence) for token, confidence in pairs] for pairs in SAID]
  candidates_XI, confidences_XI = np.array(said).transpose(2, 0, 1)
  with jax.enable_x64(True):
    candidates_XI = jnp.asarray(candidates_XI.astype(int))
    spoken = distribution(candidates_XI, jnp.asarray(confidences_XI), V)
    density_XZ = np.asarray(spoken.density_XZ)
    for target in range(V):
      hit_XZ = np.asarray(happened(candidates_XI, jnp.full(len(said), target)))
      assert (hit_XZ.sum(axis=1) == 1).all()
      got = {name: np.asarray(rule.of(spoken, hit_XZ)) for name, rule in SCORES.items()}
      for x, pairs in enumerate(said):
        q = by_hand(pairs, V)
        np.testing.assert_allclose(density_XZ[x][hit_XZ[x]], [q[target]], rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(got["brier"][x], -sum((q[v] - (v == target)) ** 2 for v in range(V)), rtol=1e-9)
        np.testing.assert_allclose(got["spherical"][x], q[target] / math.sqrt(sum(a * a for a in q)), rtol=1e-9)
        named = [token for token, _ in pairs]
        assert got["zero_one"][x] in ((0, 1) if target in named else (0,))
  np.testing.assert_allclose(np.asarray(spoken.mass_XZ).sum(axis=1), 1, rtol=1e-12)
  assert (np.asarray(spoken.size_XZ).sum(axis=1) == V).all()


def test_certainty_about_everything_does_not_pay():
  """Five times 1.0 is worth what five times 0.2 is, under every rule."""
  make = lambda q: Report(
    jnp.arange(5)[None, None, None], jnp.full((1, 1, 1, 5), q), None, jnp.array([[3]]), None, None, 8
  )
  for name in SCORES:
    np.testing.assert_allclose(score(name, make(1.0)), score(name, make(0.2)), rtol=1e-6)


def policy_of(name, p, K, steps=400):
  """Softmax policy over K reports q of an event of probability p, by the exact gradient of its expected score."""
  q_K = np.linspace(0, 1, K)
  value_K = expected(name, np.stack([q_K, 1 - q_K, 0 * q_K], axis=1), np.array([p, 1 - p, 0]), sizes=[1, 1, 0])
  logits_K = np.zeros(K)
  for _ in range(steps):
    pi_K = np.exp(logits_K - logits_K.max())
    pi_K /= pi_K.sum()
    gradient = pi_K * (value_K - pi_K @ value_K)
    logits_K += 2 * gradient / np.abs(gradient).max().clip(1e-12)
  return float(pi_K @ np.abs(q_K - p))


def test_reports_of_bernoulli_contexts_become_true_under_a_proper_score_only():
  """A policy of tables: the expected distance of what it says from p_c, under each rule."""
  p_C = [0.1, 0.3, 0.5, 0.7, 0.9]
  error = {name: np.mean([policy_of(name, p, K=11) for p in p_C]) for name in SCORES}
  assert all((error[name] < 0.03) == (rule.floor is not None) for name, rule in SCORES.items()), error
  assert error["zero_one"] > 0.15
