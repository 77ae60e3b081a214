"""Thoughts that a head ends: every exit is a thought of that fixed length, and its probability is the loop's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from thinking_lm.model.decoder import Model, ModelConfig
from thinking_lm.model.rollout import rollout
from thinking_lm.objectives.objective import ObjectiveConfig, objective
from thinking_lm.thoughts import halting
from thinking_lm.thoughts.placement import place
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Batch, Vocabulary

V, T, n = 4, 6, 3
VOCABULARY = Vocabulary(V, V - 1, np.ones(V, np.int32), np.zeros(V, np.int8))
MODEL = Model(ModelConfig(layers=1, width=8, heads=2), V, heads=("halt", "mix", "router"))
FIXED = ThoughtConfig(placement="stride", stride=2, topology="private", kind="latent", length=n)


def _params():
  leaves, tree = jax.tree.flatten(MODEL.init(jax.random.key(0)))
  random = np.random.default_rng(0)
  return jax.tree.unflatten(tree, [leaf + 0.3 * random.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


PARAMS = _params()


@functools.cache
def batch():
  random = np.random.default_rng(0)
  tokens, targets = random.integers(V - 1, size=(2, 2, T))
  ones = np.ones((2, T), np.int32)
  weights = random.choice([0.5, 1.0, 2.0], (2, T)).astype(np.float32)
  return Batch(tokens, targets, weights, ones, np.arange(T) * ones, np.arange(2, dtype=np.uint32))


def run(thought, params=None):
  assert not thought.faults()
  function = lambda p: rollout(MODEL, thought, p, batch(), place(batch(), thought, VOCABULARY), jax.random.key(3))
  compiled = jax.jit(function)
  return jax.tree.map(np.asarray, compiled(PARAMS if params is None else params))


@functools.cache
def of_length(u):
  return run(dataclasses.replace(FIXED, length=u)).logp_BGT[:, 0]


ANCHORS = np.arange(1, T, 2)


@pytest.mark.parametrize("rule", ["ponder", "router"])
def test_every_exit_is_a_thought_of_that_length(rule):
  thought = dataclasses.replace(FIXED, halting=rule)
  got = run(thought)
  lengths = dict(ponder=[0, 1, 2, 3], router=[0, 3])[rule]
  np.testing.assert_array_equal(got.exit_length_K, lengths)
  expected = np.stack([of_length(u)[:, ANCHORS] for u in lengths], axis=-1) * batch().weights_BT[:, ANCHORS, None]
  np.testing.assert_allclose(got.exit_outcome_BGNK[:, 0], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(np.exp(got.exit_logp_BGNK).sum(axis=-1), 1.0, rtol=1e-5)
  gone = np.cumsum(np.exp(got.exit_logp_BGNK), axis=-1)[:, 0]
  for stop_at in (0.3, 0.7):
    used = run(dataclasses.replace(thought, stop_at=stop_at)).used_BGN[:, 0]
    first = np.argmax(gone[..., :-1] >= stop_at, axis=-1)
    np.testing.assert_array_equal(used, np.array(lengths)[np.where((gone[..., :-1] >= stop_at).any(-1), first, -1)])
  chosen = np.searchsorted(lengths, got.used_BGN[:, 0])[..., None]
  outcome = np.take_along_axis(expected, chosen, axis=-1)[..., 0]
  np.testing.assert_allclose(got.outcome_BGN[:, 0], outcome, rtol=1e-4, atol=1e-5)


class Says:
  """A model whose heads say the same of every state."""

  def __init__(self, odds):
    self.heads = dict(halt=lambda hidden: jnp.full(hidden.shape[:-1], odds))


def test_the_exits_of_a_constant_chance_by_hand():
  thought = dataclasses.replace(FIXED, halting="ponder")
  found = halting.exit_logp(Says(np.log(0.25 / 0.75)), thought, jnp.zeros((n + 1, 2)))
  np.testing.assert_allclose(np.exp(found), [0.25, 0.25 * 0.75, 0.25 * 0.75**2, 0.75**3], rtol=1e-5)
  sure = halting.exit_logp(Says(60.0), thought, jnp.zeros((n + 1, 2)))
  np.testing.assert_allclose(sure, [0.0, -60.0, -120.0, -180.0], rtol=1e-5, atol=1e-5)


def test_drawn_ends_have_the_exits_frequencies():
  thought, count = dataclasses.replace(FIXED, halting="ponder", stop_at=0.0), 4000
  model, hidden, keys = Says(np.log(0.4 / 0.6)), jnp.zeros((count, 2)), jax.random.split(jax.random.key(0), count)
  progress = halting.begin(model, thought, hidden, keys)
  for j in range(n):
    progress = halting.reached(model, thought, halting.drawn(model, thought, progress, None, j), hidden, j + 1)
  expected = np.exp(halting.exit_logp(model, thought, jnp.zeros((n + 1, 2))))
  got = np.bincount(progress.used_X, minlength=n + 1) / count
  np.testing.assert_allclose(got, expected, atol=4 * np.sqrt(0.25 / count))


def test_a_high_price_ends_all_thoughts_and_leaves_the_plain_decoder():
  thought = dataclasses.replace(FIXED, halting="ponder")
  goal = ObjectiveConfig(price=3.0)
  layout = place(batch(), thought, VOCABULARY)

  @jax.jit
  def step(params, _):
    loss = lambda p: objective(goal, rollout(MODEL, thought, p, batch(), layout, None))[0]
    return jax.tree.map(lambda p, g: p - 0.05 * g, params, jax.grad(loss)(params)), None

  heads = jax.tree.map(lambda a: a, PARAMS["heads"])
  heads["halt"]["bias"] = heads["halt"]["bias"] - 3
  start = PARAMS | dict(heads=heads)
  assert run(thought, start).used_BGN.any()
  trained = jax.lax.scan(step, start, None, length=100)[0]
  trace = run(thought, trained)
  assert not trace.used_BGN.any()
  np.testing.assert_allclose(trace.logp_BGT[:, 0], trace.base_logp_BT, rtol=1e-6)
  plain = run(dataclasses.replace(thought, length=0, halting="fixed"), trained)
  np.testing.assert_allclose(trace.logp_BGT, plain.logp_BGT, rtol=1e-5, atol=1e-6)
  told = objective(goal, trace)[1]
  assert float(told["halt_length"]) < 0.1


def test_at_a_price_that_no_thought_is_worth_a_decoder_learns_as_one_that_never_thinks():
  """Once all thoughts end before their first token, the gradient is the plain decoder's, and so is all that follows."""
  thought = dataclasses.replace(FIXED, halting="ponder")
  halt = PARAMS["heads"]["halt"]
  ended = PARAMS | dict(heads=PARAMS["heads"] | dict(halt=halt | dict(bias=halt["bias"] + 40)))
  layout = place(batch(), thought, VOCABULARY)

  def gradient(goal, thought):
    loss = lambda params: objective(goal, rollout(MODEL, thought, params, batch(), layout, None))[0]
    return jax.jit(jax.value_and_grad(loss))(ended)

  dear, of_dear = gradient(ObjectiveConfig(price=1e3), thought)
  plain, of_plain = gradient(ObjectiveConfig(), dataclasses.replace(thought, length=0, halting="fixed"))
  assert float(dear) == pytest.approx(float(plain), rel=1e-6)
  assert float(optax.tree.norm(optax.tree.sub(of_dear, of_plain)) / optax.tree.norm(of_plain)) < 1e-5
  at_start = gradient(ObjectiveConfig(price=0.0), dataclasses.replace(thought, halting="fixed"))[1]
  assert float(optax.tree.norm(optax.tree.sub(at_start, of_plain)) / optax.tree.norm(of_plain)) > 1e-2


@pytest.mark.parametrize("mixing,ends", [("probability", (-40.0, 0.0, 40.0)), ("logit", (0.0, 0.5, 1.0))])
def test_the_mixture_lies_between_its_parts_and_is_theirs_at_either_end(mixing, ends):
  thought = dataclasses.replace(FIXED, mixing=mixing)

  def told(bias):
    heads = jax.tree.map(jnp.zeros_like, PARAMS["heads"])
    heads["mix"]["out"]["bias"] += bias
    return run(thought, PARAMS | dict(heads=heads))

  after, without = of_length(n)[:, ANCHORS], of_length(0)[:, ANCHORS]
  base, half, whole = map(told, ends)
  np.testing.assert_allclose(whole.logp_BGT[:, 0, ANCHORS], after, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(base.logp_BGT[:, 0, ANCHORS], without, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(half.mix_BGN, 0.5)
  if mixing == "probability":
    np.testing.assert_allclose(
      np.exp(half.logp_BGT[:, 0, ANCHORS]), (np.exp(after) + np.exp(without)) / 2, rtol=1e-4, atol=1e-6
    )
  metrics = objective(ObjectiveConfig(), half)[1]
  assert float(metrics["mix_weight"]) == 0.5 and float(metrics["mix_weight_2of5"]) == 1.0
  if mixing == "logit":  # nothing bounds it: a thought can be trusted more than wholly
    beyond = told(2.0)
    assert float(objective(ObjectiveConfig(), beyond)[1]["mix_weight_4of5"]) == 1.0
    assert (beyond.logp_BGT[:, 0, ANCHORS] < np.minimum(after, without) - 1e-3).any()
