"""Thoughts that answer: drawn and scored alike, part of the policy, seen by nobody (peek_test: nor do they peek)."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import problem
from tests.slow import leaving
from thinking_lm.model.decoder import Model, ModelConfig
from thinking_lm.model.rollout import rollout
from thinking_lm.objectives.objective import ObjectiveConfig, objective
from thinking_lm.thoughts.answer import answered
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Batch, Thoughts, Vocabulary

V, T, BORDER = 4, 5, 3
VOCABULARY = Vocabulary(V, BORDER, np.ones(V, np.int32), np.zeros(V, np.int8))
MODEL = Model(ModelConfig(layers=2, width=8, heads=2, kv_heads=1, mlp_width=12), V, border=BORDER)
ROWS = Batch(
  *(np.array([[0, 1, 2, 1, 0]], np.int32), np.array([[1, 2, 1, 0, 3]], np.int32)),
  *(np.array([[1, 2, 0.5, 1, 1]], np.float32), np.ones((1, T), np.int32), np.arange(T, dtype=np.int32)[None]),
  np.array([7], np.uint32),
)
LAYOUT = problem.layout([[1, 3]], T=T)


def config(**options):
  values = dict(kind="sampled", length=2, topology="private", lookahead=2, samples=3, temperature=0.8, rotary="advance")
  made = ThoughtConfig(**(values | options))
  assert not made.faults()
  return made


@functools.cache
def params():
  return problem.moved(MODEL, 0.6)


@functools.cache
def compiled(thought):
  run = lambda p, batch, given: rollout(MODEL, thought, p, batch, LAYOUT, jax.random.key(3), given)
  return jax.jit(run)


def run(thought, given=None, batch=ROWS):
  return jax.device_get(compiled(thought)(params(), batch, given))


def thoughts_of(tokens, answers):
  tokens = jnp.asarray(tokens, jnp.int32)
  return Thoughts(MODEL.bind(params()).embed(tokens), tokens, None, jnp.asarray(answers, jnp.int32))


@pytest.mark.parametrize("m,halting", leaving([(1, "fixed"), (3, "stop")], [(1, "fixed")]))
def test_drawing_equals_scoring(m, halting):
  thought = functools.partial(config, answer=m, samples=6, halting=halting)
  drawn, scored = run(thought(rescore=False)), run(thought())
  again = run(thought(), thoughts_of(scored.thoughts.tokens_BGNJ, scored.thoughts.answer_BGNA))
  np.testing.assert_array_equal(drawn.thoughts.answer_BGNA, scored.thoughts.answer_BGNA)
  for other in (drawn, again):
    for name in ("policy_logp_BGN", "token_logp_BGNJ", "logp_BGT", "outcome_BGN", "chosen_BGNJ"):
      np.testing.assert_allclose(getattr(other, name), getattr(scored, name), rtol=1e-4, atol=1e-5)
  answers = scored.thoughts.answer_BGNA
  assert answers.shape == (1, 6, 2, m) and answers.min() >= 0 and answers.max() < V
  assert len(np.unique(answers)) > 1, "the draws differ, or the test says nothing"


def test_the_policy_sums_to_one_and_what_is_behind_a_border_does_not_exist():
  said = [(a, b) for a in range(3) for b in range(V)] + [(BORDER, 0)]
  kinds = [(z, *pair) for z in range(V) for pair in said]
  thought = config(length=1, answer=2, samples=len(kinds), temperature=2.0)
  put = lambda kinds: np.broadcast_to(np.array(kinds)[None, :, None], (1, len(kinds), 2, 3))
  trace = run(thought, thoughts_of(put(kinds)[..., :1], put(kinds)[..., 1:]))
  np.testing.assert_allclose(np.exp(trace.policy_logp_BGN).sum(axis=1), 1.0, rtol=1e-5)
  other = [(z, a, 2 if a == BORDER else b) for z, a, b in kinds]
  same = run(thought, thoughts_of(put(other)[..., :1], put(other)[..., 1:]))
  np.testing.assert_array_equal(same.policy_logp_BGN, trace.policy_logp_BGN)


def test_to_answer_is_to_predict():
  """At temperature 1 the first token's log-probability is that of the target, were it the answer."""
  thought = config(answer=2, temperature=1.0)
  own = run(thought)
  for g, n in itertools.product(range(3), range(2)):
    at, named = LAYOUT.anchors_BN[0, n], own.thoughts.answer_BGNA[0, g, n, 0]
    targets = ROWS.targets_BT.copy()
    targets[0, at] = named
    logp = run(thought, own.thoughts, ROWS.replace(targets_BT=targets)).logp_BGT[0, g, at]
    np.testing.assert_allclose(own.token_logp_BGNJ[0, g, n, 2], logp, rtol=1e-4, atol=1e-5)


def test_no_prediction_sees_an_answer():
  thought = config(answer=3)
  own = run(thought, thoughts_of([[[[0, 1]] * 2] * 3], [[[[0, 1, 2]] * 2] * 3]))
  given = own.thoughts.replace(answer_BGNA=(own.thoughts.answer_BGNA + 1) % V)
  other, without = run(thought, given), run(config(), own.thoughts.replace(answer_BGNA=None))
  for name in ("logp_BGT", "base_logp_BT", "outcome_BGN", "ahead_logp_BGNA"):
    np.testing.assert_array_equal(getattr(other, name), getattr(own, name))
    np.testing.assert_allclose(getattr(without, name), getattr(own, name), rtol=1e-5, atol=1e-6)
  assert (other.policy_logp_BGN != own.policy_logp_BGN).all()


REWARDED = ObjectiveConfig(nll_weight=0.0, score_weight=1.0, reward="prefix_match", advantage="leave_one_out")


def test_the_policy_gradient_expects_that_of_the_expected_reward():
  """Every pair of (thought, answer of two tokens) after one anchor, as rows; the truth by hand and enumeration."""
  said = [(a, b) for a in range(3) for b in range(V)] + [(BORDER, 0)]
  kinds = np.array([(z, *pair) for z in range(V) for pair in said])
  layout = problem.layout([[1]], T=T)

  def traced(params, kinds_BGX):
    B, G = kinds_BGX.shape[:2]
    rows, layouts = jax.tree.map(lambda a: jnp.repeat(a, B, axis=0), (ROWS, layout))
    tokens, answers = kinds_BGX[:, :, None, :1], kinds_BGX[:, :, None, 1:]
    given = Thoughts(MODEL.bind(params).embed(tokens), tokens, None, answers)
    thought = config(length=1, answer=2, samples=G)
    trace = rollout(MODEL, thought, params, rows, layouts, jax.random.key(0), given)
    return answered(trace, rows, layouts, VOCABULARY)

  # The row goes on 2 1 0 and a border, all of weight: right is what begins so.
  right = np.array([(a, b) == (2, 1) for _, a, b in kinds], np.float32)
  value = lambda p: jnp.sum(jnp.exp(traced(p, jnp.asarray(kinds)[:, None]).policy_logp_BGN[:, 0, 0]) * right)
  pairs = jnp.asarray(kinds[np.array(list(itertools.product(range(len(kinds)), repeat=2)))])

  def loss(p):
    trace = traced(p, pairs)
    weight_B = jax.lax.stop_gradient(jnp.exp(trace.policy_logp_BGN.sum(axis=(1, 2))))
    row = lambda one: objective(REWARDED, jax.tree.map(lambda a: a[None], one))[0]
    return jnp.sum(weight_B * jax.vmap(row)(trace))

  truth, expected = (jax.device_get(jax.jit(jax.grad(of))(params())) for of in (value, loss))
  assert problem.relative(jax.tree.map(np.negative, expected), truth) < 1e-4
  assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(truth)) > 1e-3


@pytest.mark.parametrize(
  "values,message",
  [
    (dict(kind="latent"), "answer needs kind 'sampled' or 'noisy'"),
    (dict(topology="persistent", lookahead=0), "answer needs topology 'private'"),
    (dict(mixing="probability"), "answer needs mixing 'none'"),
    (dict(length=0), "answer needs thought.length above 0"),
  ],
)
def test_what_cannot_answer(values, message):
  thought = ThoughtConfig(**(dict(kind="sampled", length=2, topology="private", answer=1) | values))
  (line,) = thought.faults()
  assert message in line
