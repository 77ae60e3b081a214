"""Drawing and scoring thought tokens: one temperature, one distribution, real tokens only."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from thinking_lm.model.attention import MASKED
from thinking_lm.thoughts import tokens
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.thoughts.tokens import KINDS, draw, log_policy

LOGITS_V = np.array([0.3, -1.0, 1.2, 0.0, -0.4, MASKED, MASKED, MASKED], np.float32)
REAL = 5
COUNT = 20_000
KEYS = jax.random.split(jax.random.key(3), COUNT)
STUB = types.SimpleNamespace(
  logits=lambda hidden, stop=False: hidden, mix=lambda weights: weights, embed=lambda tokens: tokens
)


def probabilities(temperature):
  weights_V = np.exp(LOGITS_V[:REAL].astype(np.float64) / temperature)
  return weights_V / weights_V.sum()


def chi_square(token_X, temperature):
  """Pearson's statistic less its mean, in its standard deviations, of draws against softmax(logits / temperature)."""
  expected_V = probabilities(temperature) * len(token_X)
  observed_V = np.bincount(token_X, minlength=REAL)
  freedom = REAL - 1
  return (((observed_V - expected_V) ** 2 / expected_V).sum() - freedom) / np.sqrt(2 * freedom)


def drawn(kind, temperature):
  config = ThoughtConfig(kind=kind, length=1, temperature=temperature)
  logits_XV = jnp.broadcast_to(LOGITS_V, (COUNT, len(LOGITS_V)))
  return np.asarray(jax.jit(lambda x, keys: KINDS[kind].step(STUB, x, keys, config)[1])(logits_XV, KEYS))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_frequencies_are_softmax_at_the_temperature(temperature):
  token_X = drawn("sampled", temperature)
  assert token_X.max() < REAL
  assert abs(chi_square(token_X, temperature)) < 4
  assert chi_square(token_X, temperature * 1.3) > 40  # the test can tell temperatures apart


@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test_gumbel_frequencies_do_not_depend_on_the_temperature(temperature):
  token_X = drawn("gumbel", temperature)
  assert token_X.max() < REAL
  assert abs(chi_square(token_X, 1.0)) < 4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_scored_at_the_temperature_that_was_drawn_at(temperature):
  logits_XV = jnp.broadcast_to(LOGITS_V, (REAL, len(LOGITS_V)))
  logp_X, entropy_X = log_policy(logits_XV, jnp.arange(REAL), temperature)
  p_V = probabilities(temperature)
  np.testing.assert_allclose(logp_X, np.log(p_V), rtol=1e-5)
  np.testing.assert_allclose(entropy_X, np.full(REAL, -(p_V * np.log(p_V)).sum()), rtol=1e-5)


def test_temperature_0_is_greedy_and_a_point_mass():
  logits_XV = jnp.broadcast_to(LOGITS_V, (4, len(LOGITS_V)))
  assert (draw(logits_XV, KEYS[:4], 0.0) == LOGITS_V.argmax()).all()
  for part in log_policy(logits_XV, jnp.arange(4), 0.0):
    np.testing.assert_array_equal(part, np.zeros(4))


def test_a_small_temperature_is_finite_and_nearly_greedy():
  logits_XV = jnp.broadcast_to(LOGITS_V, (4, len(LOGITS_V)))
  best = jnp.full(4, LOGITS_V.argmax())
  assert (draw(logits_XV, KEYS[:4], 1e-3) == best).all()
  for part in log_policy(logits_XV, best, 1e-3):
    np.testing.assert_allclose(part, np.zeros(4), atol=1e-6)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-23])
def test_the_ends_of_the_unit_interval_draw_tokens_that_can_be(monkeypatch, uniform):
  # Tokens 0 and 4 have no probability, and the control rows after them neither.
  logits_XV = jnp.array([[-500.0, 0.1, 0.2, 0.3, -500.0, MASKED, MASKED]])
  monkeypatch.setattr(jax.random, "uniform", lambda key: jnp.float32(uniform))
  assert draw(logits_XV, KEYS[:1], 1.0).item() == (1 if uniform == 0 else 3)


def test_soft_keeps_the_top_k_and_renormalises():
  config = ThoughtConfig(kind="soft", length=1, temperature=0.7, top_k=2)
  mean_V, token = KINDS["soft"].step(STUB, jnp.asarray(LOGITS_V)[None], None, config)
  p_V = probabilities(0.7)
  kept_V = np.where(p_V >= np.sort(p_V)[-2], p_V, 0)
  np.testing.assert_allclose(mean_V[0, :REAL], kept_V / kept_V.sum(), rtol=1e-5)
  assert not mean_V[0, REAL:].any() and token.item() == LOGITS_V.argmax()


@pytest.mark.parametrize("name", KINDS)
def test_claims_of_a_kind(name):
  # A policy needs draws. What is serial depends on the hidden state, what is not does not.
  kind = KINDS[name]
  assert kind.stochastic or not kind.policy
  assert kind.policy or not kind.discrete
  model = types.SimpleNamespace(
    **dict(
      logits=lambda h, stop=False: h,
      mix=lambda w: w,
      feedback=lambda h: h,
      pause=6,
      embed=lambda t: jax.nn.one_hot(t, 8),
      embed_row=lambda row, *shape: jnp.broadcast_to(jax.nn.one_hot(row, 8), (*shape, 8)),
    )
  )
  config = ThoughtConfig(kind=name, length=1)
  step = lambda x, key: kind.step(model, x, jax.random.split(jax.random.key(key), 64), config)[0]
  same, other = jnp.broadcast_to(LOGITS_V, (64, 8)), jnp.broadcast_to(LOGITS_V[[4, 3, 2, 1, 0, 5, 6, 7]] * 2, (64, 8))
  assert bool((step(same, 0) != step(same, 1)).any()) == kind.stochastic
  assert bool((step(same, 0) != step(other, 0)).any()) == kind.serial


def test_the_policy_of_a_noisy_token_is_the_density_that_it_is_drawn_from():
  """Moments of the draws, the density by quadrature, and the score function's gradient against a numeric one."""
  config = ThoughtConfig(kind="noisy", length=1, noise=0.4, temperature=0.7)
  logits_V = jnp.array([0.3, -1.0])
  step = lambda x, keys: KINDS["noisy"].step(STUB, x, keys, config)[0]
  drawn_X2 = np.asarray(jax.jit(step)(jnp.broadcast_to(logits_V, (COUNT, 2)), KEYS), np.float64)
  mean_2 = np.asarray(jax.nn.softmax(logits_V / 0.7), np.float64)
  np.testing.assert_allclose(drawn_X2.mean(axis=0), mean_2, atol=4 * 0.4 / COUNT**0.5)
  np.testing.assert_allclose(np.cov(drawn_X2.T), 0.16 * np.eye(2), atol=4 * 0.16 * (2 / COUNT) ** 0.5)

  grid = np.linspace(-2.5, 3.5, 121)
  area = (grid[1] - grid[0]) ** 2
  with jax.enable_x64(True):
    points_X2 = jnp.asarray(np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2))
    logits_V = jnp.asarray(np.array([0.3, -1.0]))
    density = lambda logits: KINDS["noisy"].policy(
      STUB, jnp.broadcast_to(logits, points_X2.shape), points_X2, None, config
    )
    np.testing.assert_allclose(float(jnp.exp(density(logits_V)[0]).sum()) * area, 1, rtol=1e-6)
    entropy = float(-(jnp.exp(density(logits_V)[0]) * density(logits_V)[0]).sum()) * area
    np.testing.assert_allclose(density(logits_V)[1][0], entropy, rtol=1e-6)
    reward_X = jnp.sin(points_X2[:, 0]) + points_X2[:, 1] ** 2
    value = lambda logits: float((jnp.exp(density(logits)[0]) * reward_X).sum() * area)
    numeric = [(value(logits_V.at[i].add(1e-4)) - value(logits_V.at[i].add(-1e-4))) / 2e-4 for i in range(2)]
    weights_X = jax.lax.stop_gradient(jnp.exp(density(logits_V)[0])) * reward_X * area
    score = jax.grad(lambda logits: (weights_X * density(logits)[0]).sum())(logits_V)
  np.testing.assert_allclose(score, numeric, rtol=1e-5)


@pytest.mark.parametrize("V", [3 * tokens.ROW + 5, 3 * tokens.ROW])
def test_two_levels_invert_the_cumulative_distribution(V):
  """Of a vocabulary of several rows with masked tokens, for numbers on and around every border."""
  random = np.random.default_rng(0)
  weights = (random.random(V) * (random.random(V) < 0.5)).astype(np.float32)
  weights[: tokens.ROW + 3] = weights[-7:] = 0.0
  rows = np.pad(weights, (0, -V % tokens.ROW)).reshape(-1, tokens.ROW)
  borders = np.cumsum(weights.astype(np.float64))
  targets = np.concatenate([[0.0], (borders[:-1] + borders[1:]) / 2, [borders[-1], borders[-1] * 1.001]])
  row, rest = tokens._invert(jnp.broadcast_to(rows.sum(axis=1), (len(targets), len(rows))), jnp.float32(targets))
  inside, _ = tokens._invert(jnp.asarray(rows)[row], rest)
  found = np.asarray(row * tokens.ROW + inside)
  assert (weights[found] > 0).all()  # also where rounding, or a target of all the weight, goes past the end
  expected = np.searchsorted(borders, targets, side="right")
  clear = np.abs(targets[:, None] - borders).min(axis=1) > 1e-3  # of rounding
  assert clear.sum() > 50
  np.testing.assert_array_equal(found[clear][:-1], expected[clear][:-1])
  logits = jnp.log(jnp.broadcast_to(jnp.asarray(weights), (500, V)))
  drawn = tokens.draw(logits, jax.random.split(jax.random.key(0), 500), 1.0)
  assert (weights[np.asarray(drawn)] > 0).all() and len(np.unique(drawn)) > 60
  uniform = jax.vmap(jax.random.uniform)(jax.random.split(jax.random.key(0), 500))
  np.testing.assert_array_equal(
    drawn, np.searchsorted(borders, np.asarray(uniform, np.float64) * borders[-1], side="right")
  )
