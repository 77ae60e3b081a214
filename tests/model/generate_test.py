"""Cached decoding against the uncached rollout of the finished text."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.slow import leaving
from thinking_lm.model import streams as streams_lib
from thinking_lm.model.decoder import Model, ModelConfig
from thinking_lm.model.generate import Sampling, generate
from thinking_lm.model.need import needed
from thinking_lm.model.rollout import rollout
from thinking_lm.thoughts.placement import place
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Batch, Thoughts, Vocabulary

V, BORDER = 6, 5
VOCABULARY = Vocabulary(V, BORDER, np.ones(V, np.int32), np.array([0, 1, 2, 3, 0, 0], np.int8))
MODEL = Model(ModelConfig(layers=2, width=16, heads=2, kv_heads=1), V, heads=("halt", "mix", "router"))
PROMPTS = [[5, 1, 2, 0], [5, 3], [5]]
X = 5
SAMPLING = Sampling(X)


@functools.cache
def params():
  """With heads that say something."""
  made = MODEL.init(jax.random.key(1))
  random = np.random.default_rng(0)
  return made | dict(heads=jax.tree.map(lambda a: a + random.normal(size=a.shape).astype(a.dtype), made["heads"]))


def rows(texts, targets_from=None):
  """Unpacked rows; weight 1 on the targets from `targets_from[b]` on."""
  T = max(map(len, texts))
  length = np.array([len(text) for text in texts])
  tokens = np.array([list(text) + [0] * (T - len(text)) for text in texts], np.int32)
  segments = (np.arange(T) < length[:, None]).astype(np.int32)
  positions = np.arange(T) * segments
  ids = np.arange(len(texts), dtype=np.uint32)
  targets = np.roll(tokens, -1, axis=1)
  return jax.tree.map(jnp.asarray, Batch(tokens, targets, segments * 1.0, segments, positions, ids))


def decode(config, sampling=SAMPLING, prompts=PROMPTS, seed=7, **more):
  function = functools.partial(generate, MODEL, config, vocabulary=VOCABULARY, sampling=sampling, **more)
  return jax.tree.map(np.asarray, jax.jit(function)(params(), rows(prompts), key=jax.random.key(seed)))


def layout(params, batch, config):
  """Where the text is thought about by teacher forcing."""
  return place(needed(MODEL, params, batch) if config.by_need else batch, config, VOCABULARY)


def uncached(config, generation, given=None):
  """log p of every drawn token, from one rollout over prompt and continuation."""
  texts = [prompt + list(drawn) for prompt, drawn in zip(PROMPTS, generation.tokens_BX, strict=True)]
  batch = rows(texts)
  given = given and given(batch)

  @jax.jit
  def score(params, batch):
    return rollout(MODEL, config, params, batch, layout(params, batch, config), jax.random.key(0), given).logp_BGT

  logp_BT = np.asarray(score(params(), batch)[:, 0])
  return np.stack([logp[len(p) - 1 : len(p) - 1 + X] for logp, p in zip(logp_BT, PROMPTS, strict=True)]), batch


NEED = dict(placement="entropy", room=9, need_above=0.5)
PLACED = [dict(placement="stride", stride=2), dict(placement="every"), NEED]
CASES = [
  ("none", {}),
  ("pause", dict(kind="pause", placement="stride", stride=2, topology="persistent")),
  ("latent", dict(kind="latent", placement="every", topology="persistent", rotary="anchor")),
  ("latent", dict(kind="latent", placement="stride", stride=2, topology="persistent", delimiters=True)),
  ("latent", dict(kind="latent", placement="sentence", cap=2, room=9, topology="persistent")),
  ("latent", dict(kind="latent", placement="every", topology="private", delimiters=True)),
  ("soft", dict(kind="soft", placement="explicit", positions=(0, 3), topology="private", rotary="anchor")),
  ("greedy", dict(kind="sampled", placement="every", topology="persistent", temperature=0.0)),
  ("entropy", dict(kind="latent", placement="every", topology="persistent", halting="entropy", stop_below=1.5)),
  ("entropy", dict(kind="soft", placement="stride", stride=2, topology="private", halting="entropy", stop_below=1.5)),
  ("need", dict(kind="latent", topology="persistent", **NEED)),
  ("need", dict(kind="latent", topology="private", **NEED)),
  ("ponder", dict(kind="latent", placement="every", topology="private", halting="ponder", stop_at=0.6)),
  ("router", dict(kind="pause", placement="every", topology="private", halting="router", mixing="probability")),
  ("mixing", dict(kind="latent", placement="stride", stride=2, topology="private", mixing="logit")),
  ("greedy", dict(kind="sampled", placement="stride", stride=3, topology="private", temperature=0.0)),
]


@pytest.mark.parametrize("name,options", leaving(CASES, [CASES[number] for number in (3, 4, 5, 9, 11)]))
def test_cached_equals_uncached(name, options):
  config = ThoughtConfig(length=0 if name == "none" else 2, **options)
  assert not config.faults()
  generation = decode(config)
  expected, _ = uncached(config, generation)
  ended = np.cumsum(generation.tokens_BX == BORDER, axis=1) - (generation.tokens_BX == BORDER) > 0
  np.testing.assert_allclose(generation.logp_BX[~ended], expected[~ended], rtol=1e-4, atol=1e-5)
  assert (generation.tokens_BX[ended] == BORDER).all() and (generation.logp_BX[ended] == 0).all()
  assert (generation.length_B == (generation.tokens_BX != BORDER).sum(1)).all()
  if config.length:
    assert generation.thought_BX.any()


@pytest.mark.parametrize("number", leaving([2, 10, 11, 12], [10, 11]))
def test_a_cache_in_many_blocks_changes_nothing(number, monkeypatch):
  config = ThoughtConfig(length=2, **CASES[number][1])
  expected = decode(config)
  monkeypatch.setattr(streams_lib, "BLOCK", 2)
  found = decode(config)
  np.testing.assert_allclose(found.logp_BX, expected.logp_BX, rtol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, found.replace(logp_BX=0), expected.replace(logp_BX=0))


def test_streams_that_ended_ask_for_no_more_slots_than_those_that_go_on(monkeypatch):
  """Private thoughts are dropped, so that whoever goes on stays behind a stream that counted every turn."""
  fed, feed = [], streams_lib.Streams.feed

  def watched(self, decoder, x_BGD, positions_BG, slot_BG):
    jax.debug.callback(lambda slot_BG: fed.append(np.ravel(slot_BG)), slot_BG)
    return feed(self, decoder, x_BGD, positions_BG, slot_BG)

  monkeypatch.setattr(streams_lib.Streams, "feed", watched)
  config = ThoughtConfig(length=2, kind="latent", placement="every", topology="private")
  made = decode(config)
  jax.effects_barrier()
  assert made.length_B.min() < X == made.length_B.max() and len(fed) == X * (1 + config.length)
  assert np.max(fed) == X - 1 + config.length


def test_drawn_thoughts_give_the_same_logp_when_put_back():
  config = ThoughtConfig(length=2, kind="sampled", placement="every", topology="private")
  generation = decode(config)

  def given(batch):
    N = batch.tokens_BT.shape[1]
    tokens = np.zeros((len(PROMPTS), 1, N, 2), np.int32)
    for b, prompt in enumerate(PROMPTS):
      tokens[b, 0, len(prompt) - 1 : len(prompt) - 1 + X] = np.maximum(generation.thoughts_BXn[b], 0)
    return Thoughts(MODEL.bind(params()).embed(jnp.asarray(tokens)), jnp.asarray(tokens))

  expected, _ = uncached(config, generation, given)
  np.testing.assert_allclose(
    generation.logp_BX[generation.thought_BX], expected[generation.thought_BX], rtol=1e-4, atol=1e-5
  )


def test_greedy_takes_the_most_likely_token_whatever_the_key():
  config = ThoughtConfig(length=1, kind="latent", placement="every")
  first, second = (decode(config, Sampling(X, temperature=0.0), seed=seed) for seed in (0, 1))
  np.testing.assert_array_equal(first.tokens_BX, second.tokens_BX)
  one = decode(config, Sampling(X, temperature=1.0, top_k=1), seed=2)
  np.testing.assert_array_equal(first.tokens_BX, one.tokens_BX)


def test_a_row_does_not_depend_on_its_neighbours():
  config = ThoughtConfig(length=1, kind="sampled", placement="stride", stride=2)
  together = decode(config)
  alone = decode(config, prompts=PROMPTS[:1])
  np.testing.assert_array_equal(together.tokens_BX[0], alone.tokens_BX[0])
  np.testing.assert_array_equal(together.thoughts_BXn[0], alone.thoughts_BXn[0])


@pytest.mark.parametrize("topology", ["persistent", "private"])
def test_samples_share_a_prompt_and_go_their_own_ways(topology):
  config = ThoughtConfig(length=2, kind="sampled", placement="stride", stride=2, topology=topology, halting="stop")
  several = jax.tree.map(lambda a: a.reshape(len(PROMPTS), 3, *a.shape[1:]), decode(config, Sampling(X, samples=3)))
  for each, first in zip(jax.tree.leaves(several), jax.tree.leaves(decode(config)), strict=True):
    np.testing.assert_allclose(each[:, 0], first, rtol=1e-5, atol=1e-6)
  assert len(np.unique(several.tokens_BX.reshape(-1, X), axis=0)) > len(PROMPTS)


@pytest.mark.parametrize("placement", leaving(PLACED, PLACED[:1]))
def test_thoughts_stand_where_the_placement_says(placement):
  config = ThoughtConfig(length=1, kind="latent", **dict(cap=2, **placement))
  # A text has all of its thoughts, up to the cap, also where a packed row would have room for one only.
  generation = decode(dataclasses.replace(config, room=1))
  assert generation.thought_BX.any() and not generation.thought_BX.all()
  for b, prompt in enumerate(PROMPTS):
    texts = prompt + list(generation.tokens_BX[b])
    batch = rows([texts])
    anchors = set(np.asarray(layout(params(), batch, config).anchors_BN[0]).tolist())
    live = generation.length_B[b] + 1
    got = {len(prompt) - 1 + i for i in np.flatnonzero(generation.thought_BX[b])}
    assert got == {a for a in anchors if len(prompt) - 1 <= a < len(prompt) - 1 + min(live, X)}


def test_another_model_says_where_decoding_thinks():
  """A watcher of another size: its need of every token so far marks the places, prompt and continuation alike."""
  proxy = Model(ModelConfig(layers=1, width=8, heads=2, kv_heads=1), V)
  config = ThoughtConfig(length=1, kind="latent", **NEED | dict(need_above=1.25))
  watcher = (proxy, jax.jit(proxy.init)(jax.random.key(2)))
  generation = decode(config, watcher=watcher)
  for b, prompt in enumerate(PROMPTS):
    end = min(generation.length_B[b] + 1, X)
    text = rows([prompt + list(generation.tokens_BX[b, :end])])
    need_T = np.asarray(needed(*watcher, text).need_BT[0, len(prompt) - 1 : len(prompt) - 1 + end])
    assert np.abs(need_T - config.need_above).min() > 1e-3
    assert generation.thought_BX[b, :end].tolist() == (need_T > config.need_above).tolist()
  assert generation.thought_BX.any() and not generation.thought_BX.all()
