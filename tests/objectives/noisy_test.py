"""Noisy thoughts on the real rollout: the policy gradient and the gradient through the noise have one expectation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.objectives import tiny
from tests.objectives.exact_test import batch, layout, thought
from thinking_lm.model.rollout import rollout
from thinking_lm.objectives.objective import ObjectiveConfig, objective
from thinking_lm.rules import estimator_faults

ROWS, REPEATS = 128, 100


def measured(config, goal):
  """(mean gradient, its standard error) over many rows that are the same but for their draws."""
  assert not config.faults() + goal.faults() + estimator_faults(goal, config)
  tile = lambda tree: jax.tree.map(lambda a: jnp.repeat(a, ROWS, axis=0), tree)
  rows = tile(batch()).replace(ids_B=jnp.arange(ROWS, dtype=jnp.uint32))
  loss = lambda params, key: -objective(goal, rollout(tiny.MODEL, config, params, rows, tile(layout()), key))[0] / ROWS
  keys = jax.random.split(jax.random.key(0), REPEATS)
  run = jax.jit(lambda p: jax.lax.map(lambda key: jax.grad(loss)(p, key), keys))
  grads = run(tiny.params())
  flat_RX = np.concatenate([np.reshape(leaf, (REPEATS, -1)) for leaf in jax.tree.leaves(grads)], axis=1).astype(float)
  return flat_RX.mean(axis=0), flat_RX.std(axis=0, ddof=1) / REPEATS**0.5


def test_both_ways_to_the_gradient_agree_and_half_of_one_does_not():
  noisy = dict(kind="noisy", noise=0.7)
  score = measured(thought("private", samples=4, **noisy), ObjectiveConfig(score_weight=1.0))
  path = measured(thought("private", rescore=False, **noisy), ObjectiveConfig())
  half = measured(thought("private", **noisy), ObjectiveConfig())
  error = np.hypot(score[1], path[1])
  moved = error > 1e-6
  assert (np.abs(score[0] - path[0])[moved] < 5 * error[moved]).all()
  assert np.linalg.norm(error) < 0.5 * np.linalg.norm(half[0] - path[0]), "the test can tell"


@pytest.mark.parametrize(
  "options,goal,message",
  [
    (dict(), dict(entropy_weight=0.1), "the entropy of kind 'noisy' is a constant"),
    (dict(rescore=False, samples=2), dict(score_weight=1.0), "leaves nothing to objective.score_weight"),
  ],
)
def test_terms_that_would_do_nothing_are_refused(options, goal, message):
  faults = estimator_faults(ObjectiveConfig(**goal), thought("private", kind="noisy", **options))
  assert [message in fault for fault in faults] == [True]
