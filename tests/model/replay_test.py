"""Thoughts that the drawing pass scores, against the same thoughts put in and scored in a pass of their own."""

import functools

import jax
import numpy as np
import pytest

from tests import traced
from tests.model import problem
from tests.model.problem import BATCH, TIED, UNTIED
from tests.slow import leaving
from thinking_lm.model.rollout import rollout
from thinking_lm.thoughts.spec import ThoughtConfig

Private = functools.partial(ThoughtConfig, topology="private", kind="sampled", length=3)
CASES = dict(
  stop=(UNTIED, Private(samples=2, halting="stop", temperature=4.0, lookahead=2)),
  stop_delimited=(TIED, Private(halting="stop", temperature=4.0, delimiters=True, rotary="advance")),
  noisy=(TIED, Private(kind="noisy", samples=2, delimiters=True, lookahead=3)),
)


@pytest.mark.parametrize("name", leaving(CASES, ["stop_delimited", "noisy"]))
def test_drawing_is_scoring(name):
  config, thought = CASES[name]
  assert not thought.faults()
  layout, weights = problem.layout(), problem.cotangents(thought)
  model, params = problem.model(config), problem.params(config)

  def scored(params, thoughts):
    if thoughts is not None and thought.kind_of.discrete:  # embeddings are parameters
      thoughts = thoughts.replace(inputs_BGNJD=model.bind(params).embed(thoughts.tokens_BGNJ))
    trace = rollout(model, thought, params, BATCH, layout, problem.KEY, thoughts)
    return problem.weighted(problem.outputs(trace, thought), weights), trace

  step = jax.jit(jax.value_and_grad(scored, has_aux=True))
  (number, trace), gradient = step(params, None)
  (same, again), expected = step(params, trace.thoughts)
  if thought.may_stop:
    used = trace.used_BGN[np.broadcast_to(trace.valid_BN[:, None], trace.used_BGN.shape)]
    assert len(np.unique(used)) > 1, "thoughts of several lengths, or the test says nothing"
  np.testing.assert_array_equal(trace.used_BGN, again.used_BGN)
  np.testing.assert_allclose(number, same, rtol=1e-4)
  for path, leaf in jax.tree.leaves_with_path(expected):
    other = functools.reduce(lambda tree, key: tree[key.key], path, gradient)
    assert np.linalg.norm(leaf - other) <= 1e-4 * np.linalg.norm(leaf), jax.tree_util.keystr(path)


def program(n, G=1, layers=2):
  """(number of operations, bytes of the largest array) of a step's gradient."""
  T, B, V = 16, 2, 11
  model = problem.Model(problem.ModelConfig(layers=layers, width=8, heads=2), V)
  thought = Private(length=n, samples=G)
  batch = problem.pack(np.zeros((B, T)), [(T,)] * B)
  layout = problem.layout([list(range(T))] * B, T=T)

  def total(params):
    trace = rollout(model, thought, params, batch, layout, jax.random.key(0))
    return trace.logp_BGT.sum() + trace.policy_logp_BGN.sum()

  asked = jax.make_jaxpr(jax.grad(total))(model.shapes).jaxpr
  largest = max(a.size * a.dtype.itemsize for a in traced.arrays(asked))
  return len(traced.equations(asked)), largest


def test_neither_program_nor_memory_grow_faster_than_the_thoughts():
  operations, largest = program(n=4)
  assert program(n=4, layers=8)[0] == operations
  for n, G in ((8, 1), (16, 1), (4, 4)):
    count, size = program(n, G)
    assert abs(count - operations) <= 8  # a group has its baseline
    assert size <= largest * (n * G / 4) * 1.5  # keys are the prefix and the thought's own: T + n, not T (n + 1)
