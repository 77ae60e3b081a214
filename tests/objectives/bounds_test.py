"""The bounds by their definitions: on tables, and through the real rollout by enumerating every group of thoughts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.objectives import bandit, tiny
from thinking_lm.objectives import bounds
from thinking_lm.objectives.bounds import BOUNDS
from thinking_lm.objectives.objective import ObjectiveConfig, objective


def test_values_of_a_batch_of_tables():
  with jax.enable_x64(True):
    params, rows = bandit.parameters(), bandit.groups(3)
    trace = bandit.traced(rows)
    logs_BG = np.asarray(bandit.outcomes(params))[rows[:, :1], rows[:, 1:]]
    got = {name: float(bound.value(trace)) for name, bound in BOUNDS.items()}
  expected = dict(J=logs_BG.mean(), M=np.log(np.exp(logs_BG).mean(axis=1)).mean(), P=np.exp(logs_BG).mean())
  for name, value in expected.items():
    np.testing.assert_allclose(got[name], value * len(rows), rtol=1e-9)


def test_pathwise_weights():
  """d value / d outcome: 1/G for J, the softmax over the group for M, p/G for P."""
  with jax.enable_x64(True):
    trace = bandit.traced(bandit.groups(2))
    p_BGN = np.exp(trace.outcome_BGN)
    for name, weight_BGN in dict(M=p_BGN / p_BGN.sum(axis=1, keepdims=True), P=p_BGN / 2).items():
      slope = jax.grad(lambda outcome, of=BOUNDS[name].value: of(trace.replace(outcome_BGN=outcome)))(trace.outcome_BGN)
      np.testing.assert_allclose(slope, weight_BGN, rtol=1e-9)
    slope = jax.grad(lambda logp: BOUNDS["J"].value(trace.replace(logp_BGT=logp)))(trace.logp_BGT)
    np.testing.assert_allclose(slope, 0.5)


def test_M_is_approached_from_below_and_so_is_its_gradient():
  with jax.enable_x64(True):
    params = bandit.parameters()
    values, errors = [], []
    target, slope = jax.jit(jax.value_and_grad(lambda p: bandit.exact(p)["M"]))(params)
    target = float(target)
    for G in (1, 2, 3, 4):
      value, found = jax.jit(jax.value_and_grad(bandit.sampled_bound), static_argnums=1)(params, G)
      values.append(float(value))
      gap = [np.ravel(found[name] - slope[name]) for name in ("policy_CZ", "reader_CZMY")]
      errors.append(np.linalg.norm(np.concatenate(gap)))
    lowest = float(bandit.exact(params)["J"])
  np.testing.assert_allclose(values[0], lowest, rtol=1e-9)
  assert all(np.diff(values) > 0) and values[-1] < target
  assert all(np.diff(errors) < 0) and errors[-1] < 0.6 * errors[0]


@pytest.mark.parametrize("topology", tiny.LOOKAHEAD)
def test_units_and_free_targets_are_all_targets_once(topology):
  trace = tiny.rolled(topology)
  persistent = topology == "persistent"
  np.testing.assert_array_equal(trace.unit_BN[0, :3], [0, 0, 2] if persistent else [0, 1, 2])
  np.testing.assert_array_equal(
    trace.free_BT[0], tiny.WEIGHTS * ([1, 0, 0, 0, 0, 0, 0] if persistent else [1, 0, 1, 0, 0, 1, 1])
  )
  over_units = bounds._over_units(lambda outcome_BGN: outcome_BGN.mean(axis=1), trace)
  np.testing.assert_allclose(over_units, BOUNDS["J"].value(trace), rtol=1e-5)


def paired(trace, G):
  """The trace of all groups of G of the thoughts, one a row; and which thoughts these are, [rows, G]."""
  index = np.array(list(itertools.product(range(len(tiny.EVERY)), repeat=G)))
  rows = lambda a: None if a is None else jnp.broadcast_to(a, (len(index), *a.shape[1:]))
  names = [name for name in trace.__dataclass_fields__ if name != "thoughts"]
  groups = {
    name: getattr(trace, name)[0][index] if "_BG" in name else rows(getattr(trace, name))
    for name in names
    if getattr(trace, name) is not None
  }
  return trace.replace(**groups), index


DIFFERENTIABLE = ("logp_BGT", "ahead_logp_BGNA", "outcome_BGN", "policy_logp_BGN", "base_logp_BT")


@functools.cache
def pulled(topology):
  """(trace, function that pulls gradients to its differentiable parts back to the parameters)."""
  trace = tiny.rolled(topology)

  def parts(params):
    found = tiny.run(topology, params)
    return {name: getattr(found, name) for name in DIFFERENTIABLE if getattr(found, name) is not None}

  pull = jax.jit(lambda params, slopes: jax.vjp(parts, params)[1](slopes)[0])
  return trace, functools.partial(pull, tiny.params())


def gradient(topology, function):
  """Gradient of function(trace) to the parameters of the decoder, flat."""
  trace, pull = pulled(topology)
  parts = {name: jnp.asarray(getattr(trace, name)) for name in DIFFERENTIABLE if getattr(trace, name) is not None}
  slopes = jax.jit(jax.grad(lambda parts: function(trace.replace(**parts))))(parts)
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(pull(slopes))])


def log_prior(trace):
  """log pi of each way to think, [27]: all thoughts of the row together."""
  return trace.policy_logp_BGN[0, :, : len(tiny.ANCHORS)].sum(axis=1)


def units(topology, trace):
  """(log p of what no thought changes, [log p of each unit's targets, [27]]), from the targets themselves."""
  logs_GT = trace.logp_BGT[0] * tiny.WEIGHTS
  if topology == "persistent":  # both documents from their first anchor on
    return logs_GT[:, 0].mean(), [logs_GT[:, 1:4].sum(axis=1), logs_GT[:, 4:6].sum(axis=1)]
  found = []
  for n, anchor in enumerate(tiny.ANCHORS):
    beyond = [t for t in tiny.outcome_of(topology, anchor) if t > anchor]
    ahead_G = sum((trace.ahead_logp_BGNA[0, :, n, 0] * tiny.WEIGHTS[t] for t in beyond), jnp.zeros(len(tiny.EVERY)))
    found.append(logs_GT[:, anchor] + ahead_G)
  return logs_GT[:, [0, 2, 5]].mean(axis=0).sum(), found


def exact(topology, bound, G, trace):
  """J or P summed over units, or E L_G by all groups of G, differentiable."""
  prior_G = jnp.exp(log_prior(trace))
  free, outcomes = units(topology, trace)
  if bound == "M":
    index = np.array(list(itertools.product(range(len(tiny.EVERY)), repeat=G)))
    of = lambda logs_G: (prior_G[index].prod(axis=1) * jnp.log(jnp.exp(logs_G)[index].mean(axis=1))).sum()
  else:
    of = lambda logs_G: (prior_G * (logs_G if bound == "J" else jnp.exp(logs_G))).sum()
  return free + sum(of(logs_G) for logs_G in outcomes)


CASES = [
  ("J", "log_prob", "leave_one_out"),
  ("M", "log_prob", "vimco"),
  ("M", "log_prob", "jepo"),
  ("P", "prob", "leave_one_out"),
]


@pytest.mark.parametrize("topology", tiny.LOOKAHEAD)
@pytest.mark.parametrize("bound,reward,advantage", CASES)
def test_the_expected_gradient_through_the_rollout_is_that_of_the_bound(topology, bound, reward, advantage):
  config = ObjectiveConfig(score_weight=1.0, bound=bound, reward=reward, advantage=advantage)
  assert not config.faults()

  def expected_loss(trace):
    groups, index = paired(trace, 2)
    probability_B = jax.lax.stop_gradient(jnp.exp(log_prior(trace)[index].sum(axis=1)))
    one = lambda row: objective(config, jax.tree.map(lambda a: a[None], row))[0]
    return (probability_B * jax.vmap(one)(groups.replace(thoughts=None))).sum()

  got = -gradient(topology, expected_loss)
  wanted = gradient(topology, functools.partial(exact, topology, bound, 2))
  assert np.linalg.norm(got - wanted) < 1e-4 * np.linalg.norm(wanted)
  others = [gradient(topology, functools.partial(exact, topology, other, 2)) for other in BOUNDS if other != bound]
  assert all(np.linalg.norm(got - other) > 0.01 * np.linalg.norm(other) for other in others)
