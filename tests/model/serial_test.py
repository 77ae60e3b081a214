"""The backward pass of serial persistent streams against plain autodiff of the same forward scan.

`rollout_test` holds both to the float64 oracle; here streams are cut into many segments, and every choice of the model
and of the thought that changes the backward pass has a case.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.model import problem
from tests.model.problem import BATCH, TIED, UNTIED, relative
from tests.slow import leaving
from thinking_lm.model import segment, serial
from thinking_lm.model.rollout import rollout
from thinking_lm.thoughts import topology
from thinking_lm.thoughts.placement import place
from thinking_lm.thoughts.spec import ThoughtConfig

Thought = functools.partial(ThoughtConfig, length=2)
GROUPED = dataclasses.replace(UNTIED, layers=1, remat="full")
CASES = dict(
  latent=(GROUPED, Thought(kind="latent", length=1, delimiters=True, rotary="advance")),
  latent_scanned_layers=(TIED, Thought(kind="latent", length=3)),
  soft=(TIED, Thought(kind="soft", delimiters=True, top_k=3, temperature=0.7)),
  gumbel=(GROUPED, Thought(kind="gumbel", temperature=0.5)),
  stop=(TIED, Thought(kind="sampled", rescore=False, halting="stop", length=3)),
)


def gradient(monkeypatch, name, cut_up: bool, dtype="float32"):
  """((number, trace), gradient), by plain autodiff of one segment or by `reverse` of many."""
  config, thought = CASES[name]
  assert not thought.faults() and not config.faults()
  config = dataclasses.replace(config, compute_dtype=dtype)
  if cut_up:
    monkeypatch.setattr(serial, "SEGMENT_SLOTS", 1)
    monkeypatch.setattr(serial, "SEGMENTS", 3)
  else:
    monkeypatch.setattr(serial, "segment", segment.forward)
  monkeypatch.setattr(segment, "UNROLLED", 1 if "scanned" in name else 4)
  cotangents, anchors_BN = problem.cotangents(thought), problem.layout().anchors_BN
  valid_BN = anchors_BN < problem.T
  taps = np.zeros((len(valid_BN), 1, valid_BN.shape[1], thought.length, config.width), np.float32)

  def loss(params, taps):
    trace = rollout(problem.model(config), thought, params, BATCH, problem.layout(), problem.KEY, None, taps)
    return problem.weighted(problem.outputs(trace, thought), cotangents), trace

  run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  (number, trace), (params, taps) = jax.device_get(run(problem.params(config), taps))
  reached_BN = np.abs(taps).max(axis=(1, 3, 4)) > 0
  assert not reached_BN[~valid_BN].any() and (thought.may_end or reached_BN[valid_BN].all())
  return (number, trace), dict(params=params, taps=taps)


@functools.cache
def in_segments(name):
  """`gradient` of many segments."""
  with pytest.MonkeyPatch.context() as patch:
    return gradient(patch, name, cut_up=True)


@pytest.mark.parametrize("name", leaving(CASES, ["gumbel", "soft", "latent_scanned_layers"]))
def test_gradients_of_many_segments_equal_autodiff_of_one(monkeypatch, name):
  (number, trace), got = in_segments(name)
  (same, expected), wanted = gradient(monkeypatch, name, cut_up=False)
  np.testing.assert_allclose(number, same, rtol=1e-5)
  np.testing.assert_array_equal(trace.thoughts.tokens_BGNJ, expected.thoughts.tokens_BGNJ)
  assert relative(got, wanted) < 1e-5
  for path, leaf in jax.tree.leaves_with_path(wanted):
    other = functools.reduce(lambda tree, key: tree[key.key], path, got)
    assert np.linalg.norm(other - leaf) <= 1e-4 * np.linalg.norm(leaf), jax.tree_util.keystr(path)


def test_bfloat16_gradients_are_near_float32_ones(monkeypatch):
  _, got = gradient(monkeypatch, "latent", cut_up=True, dtype="bfloat16")
  assert relative(got, in_segments("latent")[1]) < 0.1


def test_segments_hold_all_blocks_and_grow_in_even_steps():
  thought = Thought(delimiters=True, length=4)  # J = 6
  found = serial.segments(thought, (2,) * 50, tail=0)
  assert sum(shape.rounds for shape in found[:-1]) == 50 and len(found) == 1 + serial.SEGMENTS
  assert {shape.width for shape in found[:-1]} == {8}
  assert max(shape.rounds for shape in found[:-1]) <= 1 + min(shape.rounds for shape in found[:-1])
  assert found[-1] == segment.Shape(rounds=1, lead=2, real=0, opening=0, singles=0)
  assert sum(shape.slots for shape in found) == 2 + 50 * 8


def test_known_positions_take_no_slots_that_stay_empty():
  """Rows of one document that think at given positions: as many slots as there are tokens, and the same numbers."""
  thought = Thought(kind="latent", placement="explicit", positions=(1, 4, 9))
  batch = problem.pack(problem.TOKENS[:2], [(8,), (4,)])

  def loss(params, aligned):
    layout = place(batch, thought, problem.VOCABULARY, aligned)
    trace = rollout(problem.model(), thought, params, batch, layout, problem.KEY)
    slots = topology.persistent(batch, layout, thought.slots, "advance").token_BS.shape[1]
    return (trace.logp_BGT * batch.weights_BT[:, None]).sum(), (trace.outcome_BGN, slots)

  run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
  (number, (outcome, slots)), got = jax.device_get(run(problem.params(), 0))
  (same, (expected, more)), wanted = jax.device_get(run(problem.params(), 1))
  assert slots == problem.T + 2 * thought.slots < more
  np.testing.assert_allclose(number, same, rtol=1e-5)
  np.testing.assert_allclose(outcome[..., :2], expected[..., :2], rtol=1e-5)
  assert np.any(outcome[0, 0, :2]) and relative(got, wanted) < 1e-5


@pytest.mark.parametrize("topology", leaving(["private", "persistent"], ["private"]))
def test_the_last_think_token_has_the_gradient_of_a_given_one(topology):
  """Nothing is made from it: only earlier ones have more gradient than what is fed as it is."""
  thought, layout = Thought(kind="latent", topology=topology), problem.layout()
  run = functools.partial(rollout, problem.model(), thought, problem.params(), BATCH, layout, problem.KEY)
  value = lambda trace: (trace.logp_BGT * BATCH.weights_BT[:, None]).sum()

  def both(given):
    taps = jax.grad(lambda taps: value(run(None, taps)))(0 * given.inputs_BGNJD)
    return taps, jax.grad(lambda inputs: value(run(given.replace(inputs_BGNJD=inputs))))(given.inputs_BGNJD)

  taps, fed = jax.device_get(jax.jit(lambda: both(run().thoughts))())
  more = []
  for b, anchors in enumerate(problem.ANCHORS):
    for n in range(len(anchors)):
      document, (got, wanted) = BATCH.segments_BT[b, anchors], (taps[b, 0, n], fed[b, 0, n])
      if topology == "private" or not (document[n + 1 :] == document[n]).any():
        np.testing.assert_allclose(got[1], wanted[1], rtol=1e-3, atol=1e-6)
      more.append(np.linalg.norm(got[0] - wanted[0]) > 1e-2 * np.linalg.norm(wanted[0]))
  assert np.mean(more) > 0.5
