"""The need of a token is the next one's entropy without thoughts, and knows only its document so far."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.model import problem
from thinking_lm.model.need import needed
from thinking_lm.model.rollout import rollout
from thinking_lm.thoughts.placement import place
from thinking_lm.thoughts.spec import ThoughtConfig

LATENT = ThoughtConfig(kind="latent", length=1, placement="entropy", room=4, need_above=1.0)


@functools.cache
def need(tokens=None):
  batch = problem.BATCH if tokens is None else problem.BATCH.replace(tokens_BT=np.array(tokens, np.int32))
  return np.asarray(jax.jit(lambda p, b: needed(problem.model(), p, b).need_BT)(problem.params(), batch))


def test_need_is_the_entropy_of_the_plain_decoder():
  plain = ThoughtConfig(length=0)

  def score(params, v):
    batch = problem.BATCH.replace(targets_BT=jnp.full(problem.TOKENS.shape, v))
    layout = place(batch, plain, problem.VOCABULARY)
    return rollout(problem.model(), plain, params, batch, layout, None).logp_BGT[:, 0]

  logp = np.asarray(jax.jit(jax.vmap(score, (None, 0)))(problem.params(), jnp.arange(problem.V)))
  real = problem.BATCH.segments_BT > 0
  np.testing.assert_allclose(need()[real], -np.sum(np.exp(logp) * logp, axis=0)[real], rtol=1e-4)


def test_need_is_causal_and_of_its_document_only():
  tokens = problem.TOKENS.copy()
  tokens[:, 3:] = (tokens[:, 3:] + 1) % problem.V  # row 0: documents [0, 3) and [3, 8)
  changed = need(tuple(map(tuple, tokens)))
  real = problem.BATCH.segments_BT > 0
  np.testing.assert_array_equal(changed[:, :3][real[:, :3]], need()[:, :3][real[:, :3]])
  assert (changed[:, 3:] != need()[:, 3:])[real[:, 3:]].any()
  first = problem.TOKENS.copy()
  first[0, :3] = (first[0, :3] + 1) % problem.V
  np.testing.assert_allclose(need(tuple(map(tuple, first)))[0, 3:], need()[0, 3:], rtol=1e-6)


def test_the_neediest_tokens_are_thought_about_and_what_finds_no_room_is_counted():
  batch = problem.BATCH.replace(need_BT=need())
  marked = (need() > LATENT.need_above) & (problem.BATCH.segments_BT > 0)
  layout = place(batch, LATENT, problem.VOCABULARY)
  for b, row in enumerate(marked):
    anchors = np.flatnonzero(row)
    got = np.asarray(layout.anchors_BN[b])
    assert got[got < problem.T].tolist() == anchors[:4].tolist()
    assert layout.dropped_B[b] == max(len(anchors) - 4, 0)
  assert 0 < marked.sum() < (problem.BATCH.segments_BT > 0).sum()


def test_nobody_asks_for_a_need_without_thoughts():
  plain = dataclasses.replace(LATENT, length=0)
  assert not plain.by_need and place(problem.BATCH, plain, problem.VOCABULARY).anchors_BN.shape == (5, 0)


def test_no_gradient_flows_through_the_need():
  found = jax.grad(lambda p: needed(problem.model(), p, problem.BATCH).need_BT.sum())(problem.params())
  assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(found))
