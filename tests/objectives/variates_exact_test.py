"""Control variates' claims by enumeration: every token, and their noise on a grid, through the real rollout.

Two tokens can be thought, so the noise of a relaxed copy is a pair of exponentials, and a copy depends on their ratio
alone: softmax(z / relaxation) does not see what scales both. e / (e_1 + e_2) is uniform on the unit interval, and the
trapezoidal rule over its logit is exact to rounding (the integrand falls off exponentially). A group of two is a row
for every pair of tokens and of grid points.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.model import problem
from thinking_lm.model.decoder import Model, ModelConfig
from thinking_lm.model.enumeration import rollout_every
from thinking_lm.model.rollout import rollout
from thinking_lm.objectives.exact import marginal
from thinking_lm.objectives.objective import ObjectiveConfig, objective
from thinking_lm.objectives.variates import VARIATES, rebar
from thinking_lm.rules import estimator_faults
from thinking_lm.thoughts import relaxed, tokens
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Batch

V, T = 2, 3
STEP = {1: 0.05, 2: 0.7}
"""Of the grid, by the size of a group. What a head says has kinks, which want a fine one."""
TOLERANCE = 1e-4
TINY = ModelConfig(layers=1, width=8, heads=2, kv_heads=1, mlp_width=8)
MODELS = dict(rebar=Model(TINY, V), relax=Model(TINY, V, heads=("surrogate",)))
CASES = dict(
  rebar=(dict(samples=1, relaxation=2.0), dict(advantage="none", control=0.4)),
  P=(dict(samples=1, relaxation=1.0), dict(bound="P", reward="prob", advantage="none", control=1.0)),
  relax=(dict(samples=1, relaxation=0.7), dict(advantage="none", variate="relax", control=0.8)),
  two=(dict(samples=2, relaxation=1.0, delimiters=True), dict(advantage="leave_one_out", control=0.7)),
  rlp=(dict(samples=2, relaxation=1.0), dict(advantage="rlp", control=0.5)),
)
WRONG = dict(
  path_left_out=lambda config, trace: jax.lax.stop_gradient(rebar(config, trace)),
  path_of_half=lambda config, trace: (rebar(config, trace) + jax.lax.stop_gradient(rebar(config, trace))) / 2,
)


def grid(step):
  """(logarithms of both exponentials' shares [Q, V], weights [Q])."""
  logit_Q = np.arange(-16, 16.1, step)
  log_QV = -np.logaddexp(0, np.stack([-logit_Q, logit_Q], axis=1))
  return log_QV, step * np.exp(log_QV.sum(axis=1))


def batch(B):
  tile = lambda row, kind: np.tile(np.array(row, kind), (B, 1))
  return Batch(
    *(tile([1, 0, 1], np.int32), tile([0, 1, 0], np.int32), tile([1.0, 0.5, 2.0], np.float32)),
    *(tile([1] * T, np.int32), tile(range(T), np.int32), np.arange(B, dtype=np.uint32)),
  )


def layout(B):
  return problem.layout([[1]] * B, block=1, T=T)


def goals(name):
  options, goal = CASES[name]
  thought = ThoughtConfig(
    **dict(rotary="advance", kind="sampled", length=1, topology="private", lookahead=2, temperature=0.8) | options
  )
  goal = ObjectiveConfig(**dict(score_weight=1.0, nll_weight=1.0) | goal)
  assert not thought.faults() + goal.faults() + estimator_faults(goal, thought)
  return thought, goal


def params_of(goal):
  """Parameters; a head that was not taught anything says something all the same."""
  return problem.moved(MODELS[goal.variate], 0.3, seed=1)


def expected(name, monkeypatch):
  """The gradient that the objective expects, as a tree: of every row, times its probability."""
  thought, goal = goals(name)
  G, params = thought.samples, params_of(goal)
  noise_QV, weight_Q = grid(STEP[G])
  one = list(itertools.product(range(V), range(len(weight_Q))))
  rows = np.array(list(itertools.product(one, repeat=G)))  # [B, G, (token, point)]
  B, tokens_BG, points_BG = len(rows), rows[..., 0], rows[..., 1]
  monkeypatch.setattr(tokens, "draw", lambda logits, keys, temperature: jnp.asarray(tokens_BG).reshape(keys.shape))

  def noise(keys_BP, rows):
    """Of START, STOP and the pause, which are never thought, any."""
    return jnp.pad(noise_QV[points_BG].reshape(*keys_BP.shape, V), ((0, 0), (0, 0), (0, rows - V)))

  monkeypatch.setattr(relaxed, "noise", noise)

  def value(params):
    trace = rollout(MODELS[goal.variate], thought, params, batch(B), layout(B), jax.random.key(0))
    of_row = lambda row: objective(goal, jax.tree.map(lambda leaf: leaf[None], row))[0]
    pi_B = jnp.exp(trace.policy_logp_BGN[..., 0].sum(axis=1)) * weight_Q[points_BG].prod(axis=1)
    return -jnp.sum(jax.lax.stop_gradient(pi_B) * jax.vmap(of_row)(trace)), pi_B.sum()

  grads, total = jax.jit(jax.grad(value, has_aux=True))(params)
  assert float(total) == pytest.approx(1, abs=1e-5), "the rows are all there is"
  return grads


@functools.cache
def exact(name):
  """The gradient of the bound, all thoughts enumerated."""
  thought, goal = goals(name)
  thought = ThoughtConfig(**vars(thought) | dict(samples=1, relaxation=0.0))

  def value(params):
    every = rollout_every(MODELS[goal.variate], thought, params, batch(1), layout(1), jax.random.key(0))
    return -objective(ObjectiveConfig(exact=True, bound=goal.bound), marginal(every))[0]

  return jax.jit(jax.grad(value))(params_of(goal))


def gap(got, wanted):
  """Relative distance, of all but what the heads learn, which an exact gradient does not have."""
  rest = lambda tree: {name: leaf for name, leaf in tree.items() if name != "heads"}
  apart = optax.tree.sub(rest(got), rest(wanted))
  return float(optax.tree.norm(apart) / optax.tree.norm(rest(wanted)))


@pytest.mark.parametrize("name", CASES)
def test_claims_of_a_control_variate(name, monkeypatch):
  assert VARIATES[goals(name)[1].variate].unbiased
  assert gap(expected(name, monkeypatch), exact(name)) < TOLERANCE


@pytest.mark.parametrize("wrong", WRONG)
def test_a_variate_that_is_not_put_back_is_found(wrong, monkeypatch):
  monkeypatch.setitem(VARIATES, "rebar", VARIATES["rebar"]._replace(of=WRONG[wrong]))
  assert gap(expected("rebar", monkeypatch), exact("rebar")) > 20 * TOLERANCE
