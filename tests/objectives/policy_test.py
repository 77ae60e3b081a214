"""Ratios and divergences by their definitions: loops in float64, and enumeration of a small policy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from thinking_lm.objectives.policy import ESTIMATORS, KL_LIMIT, RATIOS, approximate_kl, surrogate

LOW, HIGH = 0.2, 0.5


@pytest.mark.parametrize("advantage", [-2.0, 0.0, 1.5])
@pytest.mark.parametrize("delta", [-50.0, -0.3, -0.1, 0.0, 0.1, 0.3, 0.5, 3.0, 50.0])
def test_the_surrogate_is_the_smaller_of_the_plain_and_the_clipped_one(delta, advantage):
  (value, cut), slope = jax.value_and_grad(surrogate, has_aux=True)(jnp.float32(delta), advantage, LOW, HIGH)
  rho = math.exp(max(-20, min(20, delta)))
  plain, clipped = rho * advantage, min(max(rho, 1 - LOW), 1 + HIGH) * advantage
  np.testing.assert_allclose(value, min(plain, clipped), rtol=1e-5)
  assert bool(cut) == (clipped < plain)
  limited = abs(delta) > 20
  np.testing.assert_allclose(slope, 0.0 if clipped < plain or limited else plain, rtol=1e-5)


def test_at_the_policy_that_drew_the_gradient_is_the_plain_one():
  slope = jax.grad(lambda delta: surrogate(delta, jnp.float32(-1.5), LOW, HIGH)[0])(jnp.float32(0))
  assert float(slope) == -1.5


def test_what_has_a_ratio():
  delta_BGNJ = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 1, 4)))
  assert RATIOS["token"](delta_BGNJ) is delta_BGNJ
  np.testing.assert_allclose(RATIOS["sequence"](delta_BGNJ)[..., 0], np.sum(delta_BGNJ, axis=-1), rtol=1e-6)


LOGITS, REFERENCE = np.random.default_rng(1).normal(size=(2, 5))


def divergence(one, other):
  p, q = jax.nn.log_softmax(one), jax.nn.log_softmax(other)
  return jnp.sum(jnp.exp(p) * (p - q))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_claims_of_an_estimator_hold_both_ways(name):
  member = ESTIMATORS[name]

  def expected(logits):
    logp, drawn = jax.nn.log_softmax(logits), jax.lax.stop_gradient(jax.nn.softmax(logits))
    return jnp.sum(drawn * member.of(logp - jax.nn.log_softmax(REFERENCE)))

  with jax.enable_x64(True):
    value, slope = jax.value_and_grad(expected)(LOGITS)
    reverse, forward = (
      jax.value_and_grad(of)(LOGITS) for of in (lambda x: divergence(x, REFERENCE), lambda x: divergence(REFERENCE, x))
    )
  assert np.allclose(value, reverse[0], rtol=1e-6) == member.unbiased
  for direction, (_, wanted) in dict(reverse=reverse, forward=forward).items():
    assert np.allclose(slope, wanted, rtol=1e-6, atol=1e-12) == (member.gradient == direction)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("delta", [-50.0, -KL_LIMIT, 0.0, 1.0, 50.0])
def test_estimators_are_finite_and_pull_back(name, delta):
  value, slope = jax.value_and_grad(ESTIMATORS[name].of)(jnp.float32(delta))
  assert np.isfinite(value) and np.isfinite(slope) and np.sign(slope) == np.sign(delta)
  assert np.isfinite(approximate_kl(jnp.float32(delta))) and float(approximate_kl(jnp.float32(delta))) >= 0


def test_k3_is_itself_up_to_the_limit_and_convex_beyond():
  for delta in (-9.0, -1.0, 0.5, 20.0):
    np.testing.assert_allclose(ESTIMATORS["k3"].of(jnp.float32(delta)), math.exp(-delta) - 1 + delta, rtol=1e-5)
  for delta in (-1e-2, -1e-4, 1e-4, 1e-2):  # near the reference: nothing as large as e^KL_LIMIT rounds the slope off
    slope = jax.grad(ESTIMATORS["k3"].of)(jnp.float32(delta))
    np.testing.assert_allclose(slope, -math.expm1(-delta), rtol=1e-2)
  slopes = [float(jax.grad(ESTIMATORS["k3"].of)(jnp.float32(delta))) for delta in (-30.0, -10.5, -9.5, -1.0, 1.0)]
  assert slopes == sorted(slopes) and slopes[0] == slopes[1] == pytest.approx(1 - math.exp(KL_LIMIT), rel=1e-6)
