"""Exact expectations: the bounds by their definitions, on a real decoder, whose every thought is enumerated twice.

The oracle is `tiny.run`, which feeds all thoughts of a row as samples, and sums over them by hand.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.objectives import tiny
from tests.slow import leaving
from thinking_lm import experiment
from thinking_lm.errors import ConfigError
from thinking_lm.model.enumeration import rollout_every
from thinking_lm.objectives.bounds import BOUNDS
from thinking_lm.objectives.exact import marginal
from thinking_lm.objectives.objective import ObjectiveConfig, objective
from thinking_lm.thoughts import enumeration
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Batch, Layout


def layout(more=0):
  """With so many anchors that do not exist."""
  anchors = np.array([[*tiny.ANCHORS, *[len(tiny.TOKENS)] * more]], np.int32)
  return Layout(jnp.asarray(anchors), block=len(tiny.TOKENS), blocks=anchors.shape[1])


def batch():
  row = lambda a, dtype=np.int32: jnp.asarray(np.asarray(a, dtype)[None])
  return Batch(
    *(row(tiny.TOKENS), row(tiny.TARGETS), row(tiny.WEIGHTS, np.float32), row(tiny.SEGMENTS), row(tiny.POSITIONS)),
    row(5, np.uint32),
  )


def thought(topology, **options):
  return ThoughtConfig(
    **dict(rotary="advance", kind="sampled", length=1, topology=topology, lookahead=tiny.LOOKAHEAD[topology]) | options
  )


@functools.cache
def summed(topology, chunk, more=0):
  """(value, gradient) under every bound, by the code; and metrics."""

  def values(params):
    every = rollout_every(tiny.MODEL, thought(topology), params, batch(), layout(more), jax.random.key(0), chunk)
    found = [objective(ObjectiveConfig(exact=True, bound=bound), marginal(every)) for bound in BOUNDS]
    return jnp.stack([-loss for loss, _ in found]), found[0]

  return differentiated(values)


def differentiated(values):
  """({bound: (value, gradient)}, what else is told) of params -> (values of all bounds, anything)."""

  def both(params):
    found, pull, told = jax.vjp(values, params, has_aux=True)
    return found, jax.vmap(pull)(jnp.eye(len(BOUNDS)))[0], told

  found, grads, told = jax.jit(both)(tiny.params())
  rows = np.concatenate([np.reshape(leaf, (len(BOUNDS), -1)) for leaf in jax.tree.leaves(grads)], axis=1)
  return {bound: (found[i], rows[i]) for i, bound in enumerate(BOUNDS)}, told


def by_hand(topology, bound, params):
  """The bound by its definition, from all 27 thoughts of the row, differentiable."""
  trace = tiny.run(topology, params)
  prior_Z = jnp.exp(trace.policy_logp_BGN[0, :, : len(tiny.ANCHORS)].sum(axis=1))
  logs_ZT = trace.logp_BGT[0] * tiny.WEIGHTS
  if topology == "persistent":  # from the first anchor of a document on
    free, units = [0], [logs_ZT[:, 1:4].sum(axis=1), logs_ZT[:, 4:6].sum(axis=1)]
  else:
    free, units = [0, 2, 5], []
    for n, anchor in enumerate(tiny.ANCHORS):
      beyond = [t for t in tiny.outcome_of(topology, anchor) if t > anchor]
      units.append(logs_ZT[:, anchor] + sum(trace.ahead_logp_BGNA[0, :, n, 0] * tiny.WEIGHTS[t] for t in beyond))
  of = dict(
    J=lambda logs_Z: (prior_Z * logs_Z).sum(),
    M=lambda logs_Z: jnp.log((prior_Z * jnp.exp(logs_Z)).sum()),
    P=lambda logs_Z: (prior_Z * jnp.exp(logs_Z)).sum(),
  )[bound]
  return logs_ZT[0, jnp.array(free)].sum() + sum(map(of, units))


@functools.cache
def wanted(topology):
  return differentiated(lambda params: (jnp.stack([by_hand(topology, bound, params) for bound in BOUNDS]), None))[0]


@pytest.mark.parametrize(
  "topology,chunk,more",
  leaving([("private", 64, 0), ("private", 2, 1), ("persistent", 10, 1)], [("private", 64, 0), ("private", 2, 1)]),
)
def test_values_and_gradients_are_those_of_the_bounds(topology, chunk, more):
  (got, _), expected = summed(topology, chunk, more), wanted(topology)
  for bound in BOUNDS:
    np.testing.assert_allclose(got[bound][0], expected[bound][0], rtol=1e-5)
    error = np.linalg.norm(got[bound][1] - expected[bound][1])
    assert error < 1e-4 * np.linalg.norm(expected[bound][1]), bound
  gradients = [expected[bound][1] for bound in BOUNDS]
  for one, other in itertools.pairwise(gradients):
    assert np.linalg.norm(one - other) > 0.01 * np.linalg.norm(one)


def test_metrics_are_expectations():
  _, metrics = summed("private", 64)[1]
  trace = tiny.rolled("private")
  prior_ZN = np.exp(
    trace.policy_logp_BGN[0, :, : len(tiny.ANCHORS)]
  )  # each of 3 thoughts of an anchor is there 9 times
  logs_T, hits_T = trace.logp_BGT[0].mean(axis=0), trace.hit_BGT[0].mean(axis=0)
  for n, anchor in enumerate(tiny.ANCHORS):
    logs_T[anchor] = (prior_ZN[:, n] * trace.logp_BGT[0, :, anchor]).sum() / 9
    hits_T[anchor] = (prior_ZN[:, n] * trace.hit_BGT[0, :, anchor]).sum() / 9
  np.testing.assert_allclose(float(metrics["nll"]), -(logs_T * tiny.WEIGHTS).sum() / tiny.WEIGHTS.sum(), rtol=1e-5)
  np.testing.assert_allclose(float(metrics["accuracy"]), (hits_T * tiny.WEIGHTS).sum() / tiny.WEIGHTS.sum(), rtol=1e-5)
  entropy_N = -(prior_ZN * np.log(prior_ZN)).sum(axis=0) / 9
  np.testing.assert_allclose(float(metrics["think_entropy"]), entropy_N.mean(), rtol=1e-4)
  assert float(metrics["think_length"]) == pytest.approx(1)


def test_thoughts_that_may_stop_are_each_there_once():
  config = thought("private", length=2, halting="stop")
  assert enumeration.number(config, tiny.V, 3) == 1 + 3 + 9
  tokens = enumeration.every(config, tiny.V, 4, 3)[:, 0].tolist()
  assert len({tuple(one) for one in tokens}) == 13 and [4, 4] in tokens and [2, 4] in tokens and [4, 2] not in tokens
  trace = jax.jit(lambda p: rollout_every(tiny.MODEL, config, p, batch(), layout(), jax.random.key(0)))(tiny.params())
  np.testing.assert_allclose(np.exp(trace.policy_logp_BGN).sum(axis=1), 1, rtol=1e-5)
  assert np.exp(trace.policy_logp_BGN[0, 0]).min() > 0  # an empty thought has a probability too


def test_persistent_thoughts_multiply_over_anchors():
  assert enumeration.number(thought("persistent"), 3, 4) == len(enumeration.every(thought("persistent"), 3, 4, 4)) == 81
  assert enumeration.number(thought("private"), 3, 4) == 3
  assert enumeration.faults(thought("private"), 4096, 9) == []
  assert "there are 4097^1 thoughts of an anchor" in enumeration.faults(thought("private"), 4097, 9)[0]
  assert "multiply over 13 anchors of a row" in enumeration.faults(thought("persistent"), 2, 13)[0]


SMALL = {
  **{"data.source": "task", "data.sequence_length": 0, "data.task.length": 3, "data.task.name": "word_problem"},
  **{"model.layers": 1, "model.width": 8, "model.heads": 2, "model.kv_heads": 1, "objective.exact": True},
  **{"thought.kind": "sampled", "thought.length": 1, "thought.topology": "private"},
}


def parsed(**options):
  config = experiment.default_config()
  config.update_from_flattened_dict(SMALL | options)
  return experiment.parse(config)


def test_an_exact_objective_draws_nothing():
  built = experiment.build(parsed(**{"objective.entropy_weight": 0.1, "objective.entropy_steps": 10}))
  params, rows = (
    built.init(jax.random.key(0)),
    jax.tree.map(jnp.asarray, next(built.data.batches("train", global_batch=2))),
  )
  run = jax.jit(lambda key, step=0: built.loss_fn(params, rows, key, experiment.Carried(step=step)))
  (first, metrics), (second, _) = run(jax.random.key(0)), run(jax.random.key(1))
  assert first == second and float(metrics["think_tokens"]) == pytest.approx(6)
  assert first < run(jax.random.key(0), 5)[0] < run(jax.random.key(0), 10)[0], "the step decides on the bonus"


@pytest.mark.parametrize(
  "options,message",
  [
    ({"thought.samples": 2}, "it needs thought.samples 1, got 2"),
    ({"thought.kind": "gumbel"}, "it needs thought.kind 'sampled', got 'gumbel'"),
    ({"thought.temperature": 0.0}, "there is nothing to sum over"),
    ({"objective.score_weight": 1.0, "objective.advantage": "none"}, "set score_weight to 0"),
  ],
)
def test_what_cannot_be_summed_is_refused(options, message):
  with pytest.raises(ConfigError, match=message):
    parsed(**options)


def test_too_many_thoughts_are_refused_once_the_data_are_known():
  config = parsed(**{"thought.length": 5})
  with pytest.raises(ConfigError, match=r"at most 4096: there are 7.5 thoughts of an anchor"):
    experiment.build(config)
