"""What stands behind thoughts, enumerated through the rollout: sampled answers, and ends that a head learns.

Every pair of ways to think (and to answer) is a row, as in enumeration_test; its probability is that of its thoughts.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import problem
from tests.objectives.reversible import probability, reversible, through
from thinking_lm.data.tokenizer import _vocabulary
from thinking_lm.model.decoder import Model, ModelConfig
from thinking_lm.model.rollout import rollout
from thinking_lm.objectives.advantages import ADVANTAGES
from thinking_lm.objectives.objective import ObjectiveConfig, objective
from thinking_lm.thoughts.answer import answered
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Batch, Thoughts

VOCABULARY = _vocabulary([b"a", b"b"])
V, T, BORDER = VOCABULARY.size, 3, VOCABULARY.document
MODEL = Model(ModelConfig(layers=2, width=8, heads=2, kv_heads=1, mlp_width=12), V, heads=("halt",), border=BORDER)
PARAMS = problem.moved(MODEL, 0.6)
FIELDS = (
  *("logp_BGT", "outcome_BGN", "policy_logp_BGN", "entropy_BGN", "token_logp_BGNJ"),
  *("exit_logp_BGNK", "exit_outcome_BGNK"),
)
PRICE, WEIGHT, PRIOR = 0.3, 0.7, 0.2

THOUGHT = ThoughtConfig(kind="sampled", topology="private", placement="explicit", positions=(1,), samples=2)
CASES = dict(
  answer=dict(length=1, answer=2),
  ponder=dict(length=2, halting="ponder"),
)


def ways(case):
  """(tokens [Z, n], answers [Z, m] or None): whatever may be thought, with whatever may be answered, once each."""
  n, m = CASES[case]["length"], CASES[case].get("answer", 0)
  thoughts, answers = (list(itertools.product(range(V), repeat=size)) for size in (n, m))
  answers = [a for a in answers if BORDER not in a[:-1] or set(a[a.index(BORDER) :]) == {BORDER}]
  both = list(itertools.product(thoughts, answers))
  return np.array([z for z, _ in both]), np.array([a for _, a in both]) if m else None


@functools.cache
def pairs(case):
  """(trace of all pairs, pull: cotangents of FIELDS -> gradient as one vector)."""
  config = ThoughtConfig(**vars(THOUGHT) | CASES[case])
  assert not config.faults()
  tokens_ZJ, answers_ZA = ways(case)
  both = np.array(list(itertools.product(range(len(tokens_ZJ)), repeat=2)))
  B = len(both)
  tile = lambda row, kind: np.tile(np.array(row, kind), (B, 1))
  batch = Batch(
    *(tile([1, 0, 1], np.int32), tile([0, 1, BORDER], np.int32), tile([1.0, 0.5, 2.0], np.float32)),
    *(tile([1] * T, np.int32), tile(range(T), np.int32), np.arange(B, dtype=np.uint32)),
  )
  layout = problem.layout([[1]] * B, block=1, T=T)
  tokens_BGNJ = tokens_ZJ[both][:, :, None]
  answer = None if answers_ZA is None else jnp.asarray(answers_ZA[both][:, :, None])

  def run(params):
    given = Thoughts(MODEL.bind(params).embed(tokens_BGNJ), jnp.asarray(tokens_BGNJ), answer_BGNA=answer)
    trace = rollout(MODEL, config, params, batch, layout, jax.random.key(0), given)
    trace = answered(trace, batch, layout, VOCABULARY)
    return {name: getattr(trace, name) for name in FIELDS}, trace

  traced, pull = reversible(run, PARAMS)
  trace = traced(PARAMS)
  np.testing.assert_allclose(probability(trace).sum(), 1, rtol=1e-5)
  return trace, pull


def gradient(case, of):
  """The gradient of a function of the trace of all pairs, as one vector."""
  return through(*pairs(case), FIELDS, of)


def expectation(case, config):
  """Minus the gradient that is expected of the loss."""
  probability_B = probability(pairs(case)[0])

  def loss(trace):
    rows = jax.tree.map(lambda leaf: leaf[:, None], trace.replace(exit_length_K=None))
    row = lambda one: objective(config, one.replace(exit_length_K=trace.exit_length_K))[0]
    return jnp.sum(probability_B * jax.vmap(row)(rows))

  return -gradient(case, loss)


def error(got, wanted):
  return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


SAMPLED = [name for name, one in ADVANTAGES.items() if one.bound != "M" and one.baseline is None]


def right(trace):
  """1 for the one answer of two tokens that is what came after "ba": "b" and the border."""
  first, second = jnp.moveaxis(trace.thoughts.answer_BGNA[:, :, 0], -1, 0)
  return ((first == 1) & (second == BORDER)).astype(jnp.float32)


@pytest.mark.parametrize("name", SAMPLED)
def test_answers_are_paid_without_bias_by_those_who_claim_it(name):
  """The gradient of E[reward], over thoughts and what they answer.

  A z-score of two rewards that are 0 and 1 is what leave-one-out gives: their standard deviation is a half.
  """
  config = ObjectiveConfig(nll_weight=0.0, score_weight=1.0, reward="prefix_match", advantage=name, price=PRICE)
  worth = lambda trace: jnp.sum(probability(trace) * right(trace).mean(axis=1))
  off = error(expectation("answer", config), gradient("answer", worth))
  fair = ADVANTAGES[name].unbiased or ADVANTAGES[name].floored
  assert off < 1e-4 if fair else off > 1e-2, off


@pytest.mark.parametrize("name", SAMPLED)
def test_learned_ends_of_sampled_thoughts(name):
  """Both terms together are the gradient of E over thoughts of what is expected over their ends."""
  options = dict(nll_weight=1.0, price=PRICE, halt_weight=WEIGHT, halt_prior=PRIOR)
  config = ObjectiveConfig(score_weight=1.0, advantage=name, **options)

  def worth(trace):
    stop_BGK = jnp.exp(trace.exit_logp_BGNK[:, :, 0])
    prior_K = jnp.array([PRIOR, (1 - PRIOR) * PRIOR, (1 - PRIOR) ** 2])
    gain_BGK = trace.exit_outcome_BGNK[:, :, 0] - PRICE * jnp.arange(3) - WEIGHT * jnp.log(stop_BGK / prior_K)
    free_BG = trace.logp_BGT[:, :, 0] * 1.0 + trace.logp_BGT[:, :, 2] * 2.0
    return jnp.sum(probability(trace) * (jnp.sum(stop_BGK * gain_BGK, axis=2) + free_BG).mean(axis=1))

  wanted = gradient("ponder", worth)
  off = error(expectation("ponder", config), wanted)
  assert off < 1e-4 if ADVANTAGES[name].unbiased else off > 1e-2, off
  assert error(expectation("ponder", ObjectiveConfig(**options)), wanted) > 1e-2
