"""Control variates on the real rollout: their mean is the exact gradient, and they vary less than REINFORCE."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.model import problem
from tests.objectives import tiny
from tests.objectives.exact_test import batch, layout, thought
from tests.slow import leaving
from thinking_lm.config import parse
from thinking_lm.errors import ConfigError
from thinking_lm.model.decoder import Model
from thinking_lm.model.enumeration import rollout_every
from thinking_lm.model.rollout import rollout
from thinking_lm.objectives.exact import marginal
from thinking_lm.objectives.objective import ObjectiveConfig, objective
from thinking_lm.objectives.variates import VARIATES
from thinking_lm.rules import estimator_faults
from thinking_lm.thoughts.spec import ThoughtConfig

ROWS, REPEATS = 128, 150
SCORE = dict(score_weight=1.0, nll_weight=1.0)
RELAX = dict(variate="relax", control=1.0)
CASES = dict(
  plain=(dict(samples=1), dict(advantage="none")),
  rebar=(dict(samples=1, relaxation=2.0), dict(advantage="none", control=0.4)),
  relax=(dict(samples=2, relaxation=0.5, delimiters=True), RELAX | dict(advantage="leave_one_out")),
)
LEARNER = Model(tiny.MODEL.config, tiny.V, heads=("surrogate",))


def model_of(goal):
  return LEARNER if goal.variate == "relax" else tiny.MODEL


@functools.cache
def moved(model):
  """Parameters; a head that was not taught anything says something all the same."""
  return problem.moved(model, 0.5)


def flat(tree, axes=0):
  """All but what the heads learn, which an exact gradient does not have."""
  kept = {name: leaf for name, leaf in tree.items() if name != "heads"}
  return np.concatenate([np.reshape(leaf, (*leaf.shape[:axes], -1)) for leaf in jax.tree.leaves(kept)], axis=axes)


def problem_of(name):
  """(thought, objective, (params, key) -> -loss of a row, mean of many rows that are the same but for their draws)."""
  options, goal = CASES[name]
  config, goal = thought("private", **options), ObjectiveConfig(**SCORE | goal)
  assert not config.faults() + goal.faults() + estimator_faults(goal, config)
  tile = lambda tree: jax.tree.map(lambda a: jnp.repeat(a, ROWS, axis=0), tree)
  rows = tile(batch()).replace(ids_B=jnp.arange(ROWS, dtype=jnp.uint32))

  def one(params, key):
    loss, told = objective(goal, rollout(model_of(goal), config, params, rows, tile(layout()), key))
    return -loss / ROWS, told

  return config, goal, one


@functools.cache
def repeated(name):
  """params -> many estimates, compiled."""
  one, keys = problem_of(name)[2], jax.random.split(jax.random.key(0), REPEATS)
  return jax.jit(lambda params: jax.lax.map(lambda key: jax.grad(one, has_aux=True)(params, key)[0], keys))


@functools.cache
def spread(name, taught=False):
  """(mean gradient, its standard error) of an estimator, as vectors."""
  params = lessons()[0] if taught else moved(model_of(problem_of(name)[1]))
  flat_RX = flat(repeated(name)(params), axes=1).astype(float)
  return flat_RX.mean(axis=0), flat_RX.std(axis=0, ddof=1) / REPEATS**0.5


@functools.cache
def measured(name):
  """(mean gradient, its standard error, exact gradient) of many rows that are the same but for their draws."""
  config, goal, _ = problem_of(name)
  model = model_of(goal)

  def exact(params):
    every = thought("private", delimiters=config.delimiters)
    trace = marginal(rollout_every(model, every, params, batch(), layout(), jax.random.key(0)))
    return -objective(ObjectiveConfig(exact=True, bound=goal.bound), trace)[0]

  return *spread(name), flat(jax.jit(jax.grad(exact))(moved(model)))


@functools.cache
def lessons(steps=150):
  """(parameters whose head alone was taught, variance_left before and after)."""
  _, goal, one = problem_of("relax")
  optimizer, params = optax.adam(0.02), moved(model_of(goal))

  def step(state, key):
    heads, memory = state
    grads, told = jax.grad(one, has_aux=True)(params | dict(heads=heads), key)
    updates, memory = optimizer.update(jax.tree.map(jnp.negative, grads["heads"]), memory)
    return (optax.apply_updates(heads, updates), memory), told["variance_left"]

  start = (params["heads"], optimizer.init(params["heads"]))
  (heads, _), left = jax.jit(lambda keys: jax.lax.scan(step, start, keys))(jax.random.split(jax.random.key(1), steps))
  ratio_S = np.asarray(left.total) / np.asarray(left.count)
  return params | dict(heads=heads), ratio_S[0], ratio_S[-10:].mean()


def is_unbiased(name):
  """Whether the mean of an estimator is the exact gradient, where it can be told."""
  mean_X, error_X, wanted_X = measured(name)
  moving = error_X > 1e-7
  assert np.linalg.norm(error_X) < 0.05 * np.linalg.norm(wanted_X), "the test can tell"
  close = (np.abs(mean_X - wanted_X)[moving] < 5 * error_X[moving]).all()
  return close and np.allclose(mean_X[~moving], wanted_X[~moving], atol=1e-5)


@pytest.mark.parametrize("name", leaving(["rebar", "relax"], ["relax"]))
def test_claims_of_a_control_variate(name):
  """With the noise that is drawn; `variates_exact_test` has the claims by enumeration."""
  assert is_unbiased(name) == VARIATES[problem_of(name)[1].variate].unbiased


def test_it_varies_less_than_reinforce():
  assert (spread("rebar")[1] ** 2).sum() < 0.65 * (spread("plain")[1] ** 2).sum()


@pytest.mark.slow
def test_a_head_learns_what_makes_the_gradient_vary_less():
  """At the logits, where it is taught: less than before, and less than without any variate. In the parameters too."""
  _, before, after = lessons()
  taught, untaught = ((spread("relax", taught)[1] ** 2).sum() for taught in (True, False))
  assert after < 0.85 * min(before, 1.0) and taught < 0.8 * untaught


def test_the_score_term_does_not_teach_the_head_and_the_head_teaches_nothing_else():
  """Its own term alone does: without the head's, nothing moves the head."""
  one, params = problem_of("relax")[2], moved(LEARNER)
  trace = jax.jit(lambda params: one(params, jax.random.key(0))[1]["variance_left"].total)
  found = jax.jit(jax.grad(lambda params: one(params, jax.random.key(0))[1]["variance_left"].total))(params)
  whole = jax.jit(jax.grad(one, has_aux=True))(params, jax.random.key(0))[0]
  assert float(trace(params)) > 0
  for got, expected in zip(*map(jax.tree.leaves, (whole["heads"], found["heads"])), strict=True):
    np.testing.assert_allclose(got, -np.asarray(expected) / ROWS, rtol=1e-4, atol=1e-6)
  assert np.abs(flat(found)).max() == 0


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
    (dict(control=0.0, variate="relax"), "variate 'relax' is read where control is above 0"),
  ],
)
def test_score_terms_without_a_control_variate_are_refused(options, message):
  with pytest.raises(ConfigError) as caught:
    parse(ObjectiveConfig, dict(score_weight=1.0, control=1.0) | options)
  assert [message in line for line in caught.value.faults] == [True]
  assert not ObjectiveConfig(score_weight=1.0, **RELAX, reward="exact_match").faults()


def test_the_weight_and_the_copy_go_together():
  faults = lambda control, relaxation: estimator_faults(
    ObjectiveConfig(score_weight=1.0, control=control), ThoughtConfig(relaxation=relaxation)
  )
  assert not faults(0.0, 0.0) and not faults(1.0, 0.5)
  assert all("set both above 0 or neither" in faults(*pair)[0] for pair in ((1.0, 0.0), (0.0, 0.5)))
