"""REBAR's control variate on the real rollout: its mean is the exact gradient, and it varies less than REINFORCE."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.objectives import tiny
from tests.objectives.exact_test import batch, layout, thought
from thinking_lm.config import parse
from thinking_lm.errors import ConfigError
from thinking_lm.model.enumeration import rollout_every
from thinking_lm.model.rollout import rollout
from thinking_lm.objectives.exact import marginal
from thinking_lm.objectives.objective import ObjectiveConfig, objective
from thinking_lm.rules import estimator_faults
from thinking_lm.thoughts.spec import ThoughtConfig

ROWS, REPEATS = 128, 150
SCORE = dict(score_weight=1.0, nll_weight=1.0)
CASES = dict(
  plain=(dict(samples=1), dict(advantage="none")),
  rebar=(dict(samples=1, relaxation=2.0), dict(advantage="none", control=0.4)),
  both=(dict(samples=2, relaxation=0.5, delimiters=True), dict(advantage="leave_one_out", control=0.7)),
  P=(dict(samples=1, relaxation=1.0), dict(bound="P", reward="prob", advantage="none", control=1.0)),
)


@functools.cache
def measured(name):
  """(mean gradient, its standard error, exact gradient) of many rows that are the same but for their draws."""
  options, goal = CASES[name]
  config, goal = thought("private", **options), ObjectiveConfig(**SCORE | goal)
  assert not config.faults() + goal.faults() + estimator_faults(goal, config)
  tile = lambda tree: jax.tree.map(lambda a: jnp.repeat(a, ROWS, axis=0), tree)
  rows = tile(batch()).replace(ids_B=jnp.arange(ROWS, dtype=jnp.uint32))

  def one(params, key):
    return -objective(goal, rollout(tiny.MODEL, config, params, rows, tile(layout()), key))[0] / ROWS

  def exact(params):
    every = thought("private", delimiters=config.delimiters)
    trace = marginal(rollout_every(tiny.MODEL, every, params, batch(), layout(), jax.random.key(0)))
    return -objective(ObjectiveConfig(exact=True, bound=goal.bound), trace)[0]

  keys = jax.random.split(jax.random.key(0), REPEATS)
  run = jax.jit(lambda params: jax.lax.map(lambda key: jax.grad(one)(params, key), keys))
  grads = run(tiny.params())
  flat_RX = np.concatenate([np.reshape(leaf, (REPEATS, -1)) for leaf in jax.tree.leaves(grads)], axis=1).astype(float)
  wanted = jax.jit(jax.grad(exact))(tiny.params())
  wanted_X = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(wanted)])
  return flat_RX.mean(axis=0), flat_RX.std(axis=0, ddof=1) / REPEATS**0.5, wanted_X


@pytest.mark.parametrize("name", ["rebar", "both", "P"])
def test_its_mean_is_the_exact_gradient(name):
  mean_X, error_X, wanted_X = measured(name)
  moved = error_X > 1e-7
  assert (np.abs(mean_X - wanted_X)[moved] < 5 * error_X[moved]).all()
  np.testing.assert_allclose(mean_X[~moved], wanted_X[~moved], atol=1e-5)
  assert np.linalg.norm(error_X) < 0.05 * np.linalg.norm(wanted_X), "the test can tell"


def test_it_varies_less_than_reinforce():
  assert (measured("rebar")[1] ** 2).sum() < 0.65 * (measured("plain")[1] ** 2).sum()


@pytest.mark.parametrize(
  "options,message",
  [
    (dict(length=2), "got length 2"),
    (dict(topology="persistent"), "got topology 'persistent'"),
    (dict(kind="gumbel"), "got kind 'gumbel'"),
    (dict(rescore=False), "got rescore False"),
    (dict(temperature=0.0), "got temperature 0"),
    (dict(relaxation=1e-5), "relaxation must be 0 or at least 0.001"),
  ],
)
def test_thoughts_that_have_no_relaxed_copy_are_refused(options, message):
  values = dict(kind="sampled", topology="private", length=1, relaxation=0.5) | options
  with pytest.raises(ConfigError) as caught:
    parse(ThoughtConfig, values)
  assert [message in line for line in caught.value.faults] == [True]


@pytest.mark.parametrize(
  "options,message",
  [
    (dict(score_weight=0.0), "control is a part of the score term"),
    (dict(advantage="grpo"), "r_g less a baseline, got 'grpo'; known: none, leave_one_out, rlp"),
    (dict(reward="exact_match"), "smooth function of the outcome, got 'exact_match'; known: log_prob, info_gain, prob"),
  ],
)
def test_score_terms_without_a_control_variate_are_refused(options, message):
  with pytest.raises(ConfigError) as caught:
    parse(ObjectiveConfig, dict(score_weight=1.0, control=1.0) | options)
  assert [message in line for line in caught.value.faults] == [True]


def test_the_weight_and_the_copy_go_together():
  faults = lambda control, relaxation: estimator_faults(
    ObjectiveConfig(score_weight=1.0, control=control), ThoughtConfig(relaxation=relaxation)
  )
  assert not faults(0.0, 0.0) and not faults(1.0, 0.5)
  assert all("set both above 0 or neither" in faults(*pair)[0] for pair in ((1.0, 0.0), (0.0, 0.5)))
