"""Thoughts that report: who may say what where, drawn and scored alike, and what the trace tells of it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.slow import leaving
from thinking_lm.model.decoder import Model, ModelConfig
from thinking_lm.model.generate import Sampling, generate
from thinking_lm.model.rollout import rollout
from thinking_lm.thoughts.placement import place
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Batch, Thoughts, Vocabulary

V, T, K = 4, 4, 3
STOP, LOWEST = V + 1, V + 3
VOCABULARY = Vocabulary(V, V - 1, np.ones(V, np.int32), np.zeros(V, np.int8))
MODEL = Model(ModelConfig(layers=1, width=16, heads=2, kv_heads=1), V, confidences=K)
TOPOLOGIES = [("private", dict(lookahead=2)), ("persistent", dict(lookahead=0))]


@functools.cache
def params():
  return MODEL.init(jax.random.key(0))


@functools.cache
def batch():
  random = np.random.default_rng(0)
  tokens, targets = random.integers(V - 1, size=(2, 2, T))
  ones = np.ones((2, T), np.int32)
  weights = np.float32([[1, 1, 1, 2], [1, 0, 1, 1]])
  return jax.tree.map(
    jnp.asarray, Batch(tokens, targets, weights, ones, np.arange(T) * ones, np.arange(2, dtype=np.uint32))
  )


def config(length, report, **options):
  values = dict(
    placement="stride",
    stride=2,
    kind="sampled",
    samples=2,
    topology="private",
    bins=K,
    temperature=10.0,
    rotary="advance",
  )
  made = ThoughtConfig(length=length, report=report, **(values | options))
  assert not made.faults()
  return made


@functools.cache
def compiled(thought):
  layout = lambda b: place(b, thought, VOCABULARY, aligned=0)
  return jax.jit(lambda p, b, given: rollout(MODEL, thought, p, b, layout(b), jax.random.key(3), given))


def run(thought, given=None, rows=None):
  return jax.device_get(compiled(thought)(params(), rows or batch(), given))


def thoughts_of(tokens):
  tokens = jnp.asarray(tokens, jnp.int32)
  return Thoughts(MODEL.bind(params()).embed(tokens), tokens)


def spoken(tokens, free, m):
  """(first token of the report, tokens in all) of one thought, spelled out."""
  for i in range(free):
    if tokens[i] == STOP:
      return i + 1, i + 1 + 2 * m
  return free, free + 2 * m


@pytest.mark.parametrize("halting", leaving(["fixed", "stop"], ["fixed"]))
@pytest.mark.parametrize("topology,options", leaving(TOPOLOGIES, TOPOLOGIES[1:]))
def test_drawing_obeys_the_roles_and_equals_scoring(topology, options, halting):
  thought = functools.partial(config, 6, 2, samples=4, topology=topology, halting=halting, **options)
  drawn, scored = run(thought(rescore=False)), run(thought())
  for name in ("logp_BGT", "policy_logp_BGN", "entropy_BGN", "outcome_BGN", "top_logp_BGT"):
    np.testing.assert_allclose(getattr(drawn, name), getattr(scored, name), rtol=1e-4, atol=1e-5)
  firsts = set()
  for b, g, n in np.ndindex(drawn.used_BGN.shape):
    tokens = drawn.thoughts.tokens_BGNJ[b, g, n].tolist()
    first, end = spoken(tokens, 2, 2)
    firsts.add(first)
    said = tokens[first:end]
    assert all(token < V for token in said[::2] + [token for token in tokens[:first] if token != STOP])
    assert all(LOWEST <= token < LOWEST + K for token in said[1::2])
    assert drawn.report.candidates_BGNI[b, g, n].tolist() == said[::2]
    np.testing.assert_allclose(drawn.report.confidences_BGNI[b, g, n], [(t - LOWEST) / (K - 1) for t in said[1::2]])
    assert drawn.used_BGN[b, g, n] == end - (STOP in tokens[:first])
  assert (len(firsts) > 1) == (halting == "stop"), "reports that begin at several places, or the test says nothing"


@pytest.mark.parametrize("halting", ["fixed", "stop"])
def test_the_policy_of_all_thoughts_sums_to_one_and_what_does_not_exist_changes_nothing(halting):
  said = list(itertools.product(range(V), range(LOWEST, LOWEST + K)))
  kinds = [(z, *pair) for z in range(V) for pair in said]
  if halting == "stop":
    kinds += [(STOP, *pair) for pair in said]
  options = dict(halting=halting, placement="explicit", positions=(2,))
  thought = config(3 if halting == "fixed" else 4, 1, samples=len(kinds), **options)
  if halting == "stop":  # with a second free token: STOP first, then the report and one token that does not exist
    kinds = [(STOP, *pair) for pair in said] + [(z, STOP, *pair) for z in range(V) for pair in said]
    kinds += [(y, z, *pair) for y in range(V) for z in range(V) for pair in said]
    thought = config(4, 1, samples=len(kinds), **options)
  given = lambda tail: np.array([(*kind, *[tail] * (thought.length - len(kind))) for kind in kinds])
  put = lambda tokens: thoughts_of(np.broadcast_to(tokens[None, :, None], (2, len(kinds), 1, thought.length)))
  trace = run(thought, put(given(0)))
  np.testing.assert_allclose(np.exp(trace.policy_logp_BGN).sum(axis=1), 1.0, rtol=1e-5)
  other = run(thought, put(given(1)))
  for name in ("logp_BGT", "policy_logp_BGN", "entropy_BGN", "outcome_BGN", "used_BGN"):
    np.testing.assert_array_equal(getattr(other, name), getattr(trace, name))
  assert len(np.unique(trace.logp_BGT[0, :, 2].round(6))) == len(kinds), "the prediction reads every token of a report"


@pytest.mark.parametrize("topology,options", leaving(TOPOLOGIES, TOPOLOGIES[:1]))
def test_what_the_model_would_do_is_its_own_prediction(topology, options):
  """Each anchor's target in turn is set to what the thought names: its log-probability is that of the report."""
  thought = config(4, 2, topology=topology, **options)
  own = run(thought)
  anchors = np.arange(1, T, 2)
  np.testing.assert_array_equal(own.report.target_BN, batch().targets_BT[:, anchors])
  np.testing.assert_array_equal(own.report.weight_BN, batch().weights_BT[:, anchors])
  for g, i in itertools.product(range(2), range(2)):
    named_BN = own.report.candidates_BGNI[:, g, :, i]
    rows = batch().replace(targets_BT=batch().targets_BT.at[:, anchors].set(named_BN))
    logp_BN = run(thought, own.thoughts, rows).logp_BGT[:, g][:, anchors]
    np.testing.assert_allclose(np.log(own.report.actual_BGNI[:, g, :, i]), logp_BN, rtol=1e-4, atol=1e-5)
  best = [
    run(thought, own.thoughts, batch().replace(targets_BT=jnp.full_like(batch().targets_BT, v))).logp_BGT
    for v in range(V)
  ]
  np.testing.assert_allclose(own.top_logp_BGT, np.max(best, axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("halting", ["fixed", "stop"])
def test_decoding_reports_and_equals_the_rollout(halting):
  thought = config(4, 1, samples=1, placement="every", halting=halting)
  prompts = jax.tree.map(lambda a: a[:, :2] if a.ndim == 2 else a, batch())
  X = 2
  function = functools.partial(generate, MODEL, thought, vocabulary=VOCABULARY, sampling=Sampling(X))
  made = jax.device_get(jax.jit(function)(params(), prompts, key=jax.random.key(6)))
  tokens = np.concatenate([prompts.tokens_BT, made.tokens_BX], axis=1)
  drawn = np.zeros((2, 1, T, 4), np.int32)
  for b, x in np.argwhere(made.thought_BX):
    shown = made.thoughts_BXn[b, x].tolist()
    said = [STOP if i < 2 and token < 0 else max(token, 0) for i, token in enumerate(shown)]
    first, end = spoken(said, 2, 1)
    assert shown[first] < V and LOWEST <= shown[first + 1] < LOWEST + K and shown[end:] == [-1] * (4 - end)
    drawn[b, 0, 1 + x] = said
  whole = batch().replace(tokens_BT=jnp.asarray(tokens), targets_BT=jnp.roll(jnp.asarray(tokens), -1, axis=1))
  logp_BT = run(thought, thoughts_of(drawn), whole).logp_BGT[:, 0]
  np.testing.assert_allclose(
    made.logp_BX[made.thought_BX], logp_BT[:, 1 : 1 + X][made.thought_BX], rtol=1e-4, atol=1e-5
  )


def test_only_models_that_report_have_rows_for_it():
  assert Model(MODEL.config, V).shapes["embedding"].shape == (V + 3, 16)
  assert MODEL.shapes["embedding"].shape == (V + 3 + K, 16)
  assert [MODEL.confidence(row) for row in range(V, V + 7)] == [None, None, None, 0.0, 0.5, 1.0, None]


@pytest.mark.parametrize(
  "values,message",
  [
    (dict(kind="latent", length=4, report=1), "report needs kind 'sampled'"),
    (dict(kind="sampled", length=3, report=2), "report 2 takes 4 of a thought's think tokens; length is 3"),
  ],
)
def test_what_cannot_report(values, message):
  (line,) = ThoughtConfig(**values).faults()
  assert message in line
