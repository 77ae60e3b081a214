"""Thoughts that end early: what is behind their end does not exist, and decoding does not compute it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.slow import leaving
from thinking_lm.model.decoder import Model, ModelConfig
from thinking_lm.model.generate import Sampling, generate
from thinking_lm.model.rollout import rollout
from thinking_lm.model.streams import Streams
from thinking_lm.thoughts.halting import used
from thinking_lm.thoughts.placement import place
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Batch, Thoughts, Vocabulary

V, T = 4, 6
STOP = V + 1
VOCABULARY = Vocabulary(V, V - 1, np.ones(V, np.int32), np.zeros(V, np.int8))
MODEL = Model(ModelConfig(layers=2, width=16, heads=2, kv_heads=1), V)


@functools.cache
def params():
  return MODEL.init(jax.random.key(0))


@functools.cache
def batch():
  random = np.random.default_rng(0)
  tokens, targets = random.integers(V - 1, size=(2, 2, T))
  ones = np.ones((2, T), np.int32)
  return jax.tree.map(
    jnp.asarray, Batch(tokens, targets, ones * 1.0, ones, np.arange(T) * ones, np.arange(2, dtype=np.uint32))
  )


def config(topology, length=3, **options):
  values = dict(placement="stride", stride=2, kind="sampled", samples=2, halting="stop", topology=topology)
  made = ThoughtConfig(length=length, **(values | options))
  assert not made.faults()
  return made


@functools.partial(jax.jit, static_argnums=0)
def think(thought, params, rows, given):
  return rollout(MODEL, thought, params, rows, place(rows, thought, VOCABULARY, aligned=0), jax.random.key(3), given)


def run(thought, given=None):
  return think(thought, params(), batch(), given)


def thoughts_of(tokens):
  tokens = jnp.asarray(tokens, jnp.int32)
  return Thoughts(MODEL.bind(params()).embed(tokens), tokens)


def test_used_by_hand():
  tokens = jnp.array([[0, STOP, 2], [STOP, STOP, 1], [1, 2, 0], [1, 2, STOP]])
  np.testing.assert_array_equal(used(config("private"), tokens, STOP), [1, 0, 3, 2])
  np.testing.assert_array_equal(used(config("private", halting="fixed"), tokens, STOP), [3, 3, 3, 3])


@pytest.mark.parametrize("delimiters", [False, True])
@pytest.mark.parametrize(
  "topology,lookahead", leaving([("persistent", 0), ("private", 1), ("private", 2)], [("private", 1)])
)
def test_a_thought_that_stops_equals_a_shorter_one(topology, lookahead, delimiters):
  """STOP after u tokens is what a fixed thought of u tokens with a closing STOP is, but for the policy's choice."""
  options = dict(lookahead=lookahead, delimiters=delimiters, rotary="anchor")
  random = np.random.default_rng(1)
  short = random.integers(V, size=(2, 2, 3, 1))
  after = random.integers(V, size=(2, 2, 3, 1))
  long = np.concatenate([short, np.full_like(short, STOP), after], axis=-1)
  got = run(config(topology, **options), thoughts_of(long))
  if not delimiters:  # a fixed thought has a closing STOP only with delimiters: let it be a think token there
    fixed_config, tokens = config(topology, length=2, halting="fixed", **options), long[..., :2]
  else:
    fixed_config, tokens = config(topology, length=1, halting="fixed", **options), short
  expected = run(fixed_config, thoughts_of(tokens))
  np.testing.assert_allclose(got.logp_BGT, expected.logp_BGT, rtol=2e-5, atol=1e-6)
  np.testing.assert_allclose(got.outcome_BGN, expected.outcome_BGN, rtol=2e-5, atol=1e-6)
  np.testing.assert_array_equal(got.used_BGN, 1)
  other = np.concatenate([long[..., :2], (after + 1) % V], axis=-1)
  again = run(config(topology, **options), thoughts_of(other))
  for name in ("logp_BGT", "policy_logp_BGN", "entropy_BGN"):
    np.testing.assert_array_equal(getattr(again, name), getattr(got, name))


@pytest.mark.parametrize("topology", leaving(["persistent", "private"], ["private"]))
def test_drawing_equals_scoring(topology):
  options = dict(temperature=5.0) | (dict(lookahead=2) if topology == "private" else {})
  drawn = run(config(topology, rescore=False, **options))
  scored = run(config(topology, **options))
  np.testing.assert_array_equal(drawn.used_BGN, scored.used_BGN)
  assert len(np.unique(drawn.used_BGN)) > 1, "thoughts of several lengths, or the test says nothing"
  for name in ("logp_BGT", "policy_logp_BGN", "entropy_BGN", "outcome_BGN"):
    np.testing.assert_allclose(getattr(drawn, name), getattr(scored, name), rtol=1e-4, atol=1e-5)


def test_the_policy_of_all_thoughts_sums_to_one():
  """All thoughts of at most 2 tokens over 4 tokens and STOP; what stands behind a STOP counts once."""
  kinds = [(a, b) for a in (*range(V), STOP) for b in (*range(V), STOP) if a != STOP or b == STOP]
  thought = config("private", length=2, placement="explicit", positions=(2,), cap=1, samples=len(kinds))
  tokens = np.broadcast_to(np.array(kinds)[None, :, None], (2, len(kinds), 1, 2))
  trace = run(thought, thoughts_of(tokens))
  np.testing.assert_allclose(np.exp(trace.policy_logp_BGN).sum(axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("topology", ["persistent", "private"])
@pytest.mark.parametrize("delimiters", leaving([False, True], [False]))
def test_decoding_stops_and_equals_the_rollout(topology, delimiters):
  X, options = 3, dict(temperature=5.0, delimiters=delimiters, rotary="advance")
  thought = config(topology, samples=1, placement="explicit", positions=(2, 3, 4), **options)
  prompts = jax.tree.map(lambda a: a[:, :3] if a.ndim == 2 else a, batch())
  function = functools.partial(generate, MODEL, thought, vocabulary=VOCABULARY, sampling=Sampling(X))
  made = jax.device_get(jax.jit(function)(params(), prompts, key=jax.random.key(0)))
  used = (made.thoughts_BXn >= 0).sum(axis=-1)
  assert (made.thoughts_BXn < V).all() and len(np.unique(used[made.thought_BX])) > 1
  tokens = np.concatenate([prompts.tokens_BT, made.tokens_BX], axis=1)
  drawn = np.where(made.thoughts_BXn < 0, STOP, made.thoughts_BXn)[:, None]
  whole = batch().replace(tokens_BT=jnp.asarray(tokens), targets_BT=jnp.roll(jnp.asarray(tokens), -1, axis=1))
  trace = think(thought, params(), whole, thoughts_of(drawn))
  expected = np.asarray(trace.logp_BGT[:, 0, 2 : 2 + X])
  np.testing.assert_allclose(made.logp_BX[made.thought_BX], expected[made.thought_BX], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("topology", leaving(["persistent", "private"], ["persistent"]))
def test_nobody_waits_for_a_neighbour_who_thinks_longer(topology, monkeypatch):
  """As many turns as the stream with the most slots has, not as many as the longest thought before each token."""
  turns, X, feed = [], 3, Streams.feed

  def counted(self, *inputs):
    jax.debug.callback(lambda: turns.append(1))
    return feed(self, *inputs)

  monkeypatch.setattr(Streams, "feed", counted)
  thought = config(topology, samples=1, placement="every", temperature=5.0)
  prompts = jax.tree.map(lambda a: a[:, :3] if a.ndim == 2 else a, batch())
  made = generate(MODEL, thought, params(), prompts, VOCABULARY, jax.random.key(0), Sampling(X))
  jax.effects_barrier()
  used_BX = np.asarray((made.thoughts_BXn >= 0).sum(axis=-1))
  slots_BX = np.asarray(made.thought_BX) * (1 + used_BX + 1)  # a token, its thought, and the STOP
  assert len(turns) == slots_BX.sum(axis=1).max() < slots_BX.max(axis=0).sum()


def test_only_what_can_draw_stop_may_halt():
  (line,) = ThoughtConfig(length=1, kind="latent", halting="stop").faults()
  assert "needs kind 'sampled'" in line


ONE = dict(placement="explicit", positions=(2,), cap=1, samples=1, rotary="anchor")


@functools.cache
def after_each_length(topology, kind, n):
  """[n + 1, V, B, T]: log p(v) at every position of rows that think for u = 0 ... n tokens, all of fixed length."""

  def one(u):
    thought = config(topology, length=u, halting="fixed", kind=kind, **ONE)

    def score(v):
      rows = batch().replace(targets_BT=jnp.full((2, T), v))
      return rollout(MODEL, thought, params(), rows, place(rows, thought, VOCABULARY), jax.random.key(3)).logp_BGT[:, 0]

    batch(), params()  # not first made while tracing
    return jax.jit(jax.vmap(score))(jnp.arange(V))

  return np.array([one(u) for u in range(n + 1)])


LOW = (("persistent", "latent"), ("private", "soft"), ("private", "pause"))


@pytest.mark.parametrize("topology,kind", leaving(LOW, LOW[1:]))
def test_low_entropy_ends_a_thought(topology, kind):
  n, (row, anchor) = 2, (np.arange(2), 2)
  logp = after_each_length(topology, kind, n)
  entropy = -np.sum(np.exp(logp) * logp, axis=1)[:, :, anchor]  # [n + 1, B]
  seen = set()
  for below in (0.0, np.median(entropy), np.max(entropy) + 1e-3):
    got = run(config(topology, length=n, halting="entropy", kind=kind, stop_below=float(below), **ONE))
    used = [next((u for u in range(n) if entropy[u, b] < below), n) for b in row]
    np.testing.assert_array_equal(got.used_BGN[:, 0, 0], used)
    expected = np.stack([logp[u, np.asarray(batch().targets_BT[b]), b, np.arange(T)] for b, u in enumerate(used)])
    np.testing.assert_allclose(got.logp_BGT[:, 0], expected, rtol=1e-4, atol=1e-5)
    seen |= set(used)
  assert {0, n} <= seen
