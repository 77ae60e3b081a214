"""The objective over exits, thoughts and groups against the expectation spelled out, by enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from thinking_lm.objectives.objective import ObjectiveConfig, objective
from thinking_lm.types import Thoughts, Trace

KINDS, K = 3, 3
LENGTHS = np.array([0, 1, 2])
PRICE, WEIGHT, PRIOR = 0.3, 0.7, 0.2


def parameters():
  random = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  return dict(policy=draw(KINDS), odds=draw(KINDS, K - 1), outcome=-jnp.abs(draw(KINDS, K)), free=draw(1))


def exit_probability(odds):
  """[K], by the loop."""
  left, found = 1.0, []
  for lam in jax.nn.sigmoid(odds):
    found.append(left * lam)
    left = left * (1 - lam)
  return jnp.stack([*found, left])


def gain(p, z):
  """What thought z is worth: expected log-probability, less price and divergence from the prior."""
  q = exit_probability(p["odds"][z])
  prior = np.array([PRIOR, (1 - PRIOR) * PRIOR, (1 - PRIOR) ** 2])
  return jnp.sum(q * (p["outcome"][z] - PRICE * LENGTHS)) - WEIGHT * jnp.sum(q * jnp.log(q / prior))


def truth(p):
  policy = jax.nn.softmax(p["policy"])
  return sum(policy[z] * gain(p, z) for z in range(KINDS)) + p["free"][0]


def trace(p, zs):
  """One row of two targets: the first after a thought, drawn as each of zs; no thought before the second."""
  G = len(zs)
  q = jax.vmap(exit_probability)(p["odds"][zs])
  logp = jnp.stack([p["outcome"][zs, -1], jnp.broadcast_to(p["free"], G)], axis=-1)
  shape = lambda a: jnp.asarray(a)[None, :, None]
  return Trace(
    logp_BGT=logp[None],
    hit_BGT=jnp.zeros((1, G, 2), bool),
    weights_BT=jnp.ones((1, 2)),
    base_logp_BT=jnp.zeros((1, 2)),
    ahead_logp_BGNA=None,
    ahead_weights_BNA=None,
    outcome_BGN=shape(p["outcome"][zs, -1]),
    policy_logp_BGN=shape(jax.nn.log_softmax(p["policy"])[zs]),
    entropy_BGN=jnp.zeros((1, G, 1)),
    valid_BN=jnp.ones((1, 1), bool),
    used_BGN=jnp.full((1, G, 1), 2),
    thoughts=Thoughts(jnp.zeros((1, G, 1, 2, 1)), jnp.zeros((1, G, 1, 2), jnp.int32)),
    unit_BN=jnp.zeros((1, 1), jnp.int32),
    free_BT=jnp.array([[0.0, 1.0]]),
    exit_logp_BGNK=shape(jnp.log(q)),
    exit_outcome_BGNK=shape(p["outcome"][zs]),
    exit_length_K=jnp.asarray(LENGTHS),
  )


@pytest.mark.parametrize("advantage,G", [("none", 1), ("leave_one_out", 2)])
def test_the_expected_gradient_is_that_of_the_expectation(advantage, G):
  goal = ObjectiveConfig(score_weight=1.0, advantage=advantage, price=PRICE, halt_weight=WEIGHT, halt_prior=PRIOR)
  policy = np.asarray(jax.nn.softmax(parameters()["policy"]))
  loss = jax.jit(jax.grad(lambda p, zs: objective(goal, trace(p, zs))[0]))
  total = jax.tree.map(jnp.zeros_like, parameters())
  for zs in np.ndindex(*[KINDS] * G):
    weight = np.prod(policy[list(zs)])
    total = jax.tree.map(lambda a, g, w=weight: a - w * g, total, loss(parameters(), np.array(zs)))
  expected = jax.grad(truth)(parameters())
  jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6), total, expected)


@pytest.mark.parametrize("price,length", [(0.0, 2), (10.0, 0)])
def test_without_a_price_thoughts_that_help_use_the_cap_and_at_a_high_one_none(price, length):
  """Gradient steps on the odds alone, where each think token makes the target more likely."""
  goal, start = ObjectiveConfig(price=price), parameters() | dict(outcome=jnp.array([[-2.0, -1.0, -0.5]] * KINDS))
  run = lambda odds: objective(goal, trace(start | dict(odds=odds), np.zeros(1, int)))
  loss = lambda odds: run(odds)[0]
  odds = jax.lax.fori_loop(0, 400, lambda _, odds: odds - jax.grad(loss)(odds), start["odds"])
  found = run(odds)[1]
  np.testing.assert_allclose(float(found["halt_length"]), length, atol=0.1)
  np.testing.assert_allclose(-float(found["loss"].total), start["outcome"][0, length] + start["free"][0], atol=0.3)
