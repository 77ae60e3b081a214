"""Who can influence whom: masks are drawn, and reach through two layers is proven by Jacobians.

In a picture of reach, each line is an output, each column an input; `#` is a derivative that is not 0, `.` one that is
exactly 0. Inputs are the row's tokens 0 ... 5 (each another id, so that the embedding table tells them apart; the head
is untied) and the thoughts a, b, ... that are put in. The row: a document of four tokens, one of one token, padding.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import problem
from tests.slow import leaving
from thinking_lm.model.decoder import Decoder
from thinking_lm.model.rollout import rollout
from thinking_lm.thoughts import topology
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Thoughts

T = 6
BATCH = problem.pack([[0, 1, 2, 3, 4, 5]], [(4, 1)]).replace(weights_BT=np.array([[1, 2, 1, 1, 1, 0]], np.float32))
ANCHORS = [[1, 3, 4]]
LAYOUT = problem.layout(ANCHORS, block=2, T=T)
Sampled = functools.partial(ThoughtConfig, kind="sampled", length=1, samples=1)


def picture(matrix) -> list[str]:
  return ["".join("#" if cell else "." for cell in line) for line in np.asarray(matrix)]


def test_the_mask_of_a_persistent_stream():
  stream = topology.persistent(BATCH, LAYOUT.replace(blocks=4), 1, "advance")
  names = [
    str(t) if t < T else "abc-"[n]
    for t, n in zip(stream.token_BS[0].tolist(), stream.anchor_BS[0].tolist(), strict=True)
  ]
  assert "".join(names) == "01a23b4-c5--"
  slot_S = jnp.arange(12)
  mask = topology.sees(stream.segments_BS, stream.segments_BS, slot_S, slot_S)[0, 0]
  assert picture(mask) == [
    # 01a23b4-c5--
    "#...........",  # 0
    "##..........",  # 1
    "###.........",  # a
    "####........",  # 2
    "#####.......",  # 3
    "######......",  # b
    "......#.....",  # 4
    "............",  # no slot
    "......#.#...",  # c
    "............",  # 5: padding
    "............",
    "............",
  ]
  assert stream.positions_BS[0, jnp.array([0, 1, 2, 3, 4, 5, 6, 8])].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
  shared = topology.persistent(BATCH, LAYOUT, 1, "anchor")
  assert shared.positions_BS[0, jnp.array([0, 1, 2, 3, 4, 5, 6, 8])].tolist() == [0, 1, 1, 2, 3, 3, 0, 0]


def test_the_mask_of_private_thoughts():
  plan = topology.private(BATCH, LAYOUT, 1, 3, "advance")
  assert picture(plan.prefix_BNT[0]) == [
    # 012345
    "##....",  # a
    "####..",  # b
    "....#.",  # c
  ]
  assert plan.ahead_BNA[0].tolist() == [[2, 3], [T, T], [T, T]]  # never another document, padding or the row's start
  assert plan.target_BNM[0].tolist() == [[1, 2, 3], [3, T, T], [4, T, T]]
  assert plan.positions_BNX[0, 0].tolist() == [2, 3, 4]
  assert topology.private(BATCH, LAYOUT, 1, 3, "anchor").positions_BNX[0, 0].tolist() == [1, 2, 3]


def test_a_look_ahead_at_the_end_of_a_full_row_does_not_wrap():
  batch = problem.pack([[0, 1, 2, 3, 4, 5]], [(6,)])
  window = topology.window(batch, problem.layout([[4, 5]], T=T), 3)
  assert window[0].tolist() == [[4, 5, T], [5, T, T]]


def reach(thought, given=True):
  """{output: lines of the picture}."""
  model, params = problem.model(problem.UNTIED), problem.params(problem.UNTIED)
  n = len(ANCHORS[0])
  rng = np.random.default_rng(0)
  inputs = jnp.asarray(rng.normal(size=(1, 1, n, 1, 8)), jnp.float32)

  def outputs(embedding, inputs):
    thoughts = Thoughts(inputs, jnp.zeros((1, 1, n, 1), jnp.int32)) if given else None
    trace = rollout(model, thought, params | dict(embedding=embedding), BATCH, LAYOUT, jax.random.key(0), thoughts)
    found = dict(logp=trace.logp_BGT[0, 0, :5], outcome=trace.outcome_BGN[0, 0])
    if thought.kind == "sampled":
      found["policy"] = trace.policy_logp_BGN[0, 0]
    if trace.base_logp_BT is not None:
      found["base"] = trace.base_logp_BT[0, :5]
    return found

  jacobian = jax.jit(jax.jacrev(outputs, argnums=(0, 1)))
  found = {}
  for name, (tokens, thoughts) in jacobian(params["embedding"], inputs).items():
    size_XT = np.abs(tokens[:, :T]).max(axis=-1)
    size_XN = np.abs(thoughts[:, 0, 0, :, 0]).max(axis=-1)
    both = np.concatenate([size_XT, size_XN], axis=1)
    assert both[both > 0].min() > 1e-5  # a derivative, and not rounding
    found[name] = picture(both)
  return found


def test_reach_of_persistent_thoughts():
  found = reach(Sampled(topology="persistent", lookahead=0))
  assert found == dict(
    logp=[
      # 012345abc
      "#........",
      "##....#..",
      "###...#..",
      "####..##.",
      "....#...#",
    ],
    policy=[
      "##.......",  # a: its own distribution does not depend on what was drawn
      "####..#..",  # b: on the thought before it
      "....#....",  # c: another document
    ],
    outcome=["####..##.", "####..##.", "....#...#"],
  )


def test_reach_of_private_thoughts():
  found = reach(Sampled(topology="private", lookahead=3))
  assert found == dict(
    logp=[
      # 012345abc
      "#........",
      "##....#..",
      "###......",  # a is not seen by the next real token, through no layer
      "####...#.",
      "....#...#",
    ],
    base=["#........", "##.......", "###......", "####.....", "....#...."],
    policy=["##.......", "####.....", "....#...."],
    outcome=[
      "####..#..",  # a and its look-ahead
      "####...#.",
      "....#...#",
    ],
  )


@pytest.mark.parametrize("topology", leaving(["persistent", "private"], ["private"]))
def test_reach_of_tokens_through_latent_thoughts_step_by_step(topology):
  thought = ThoughtConfig(kind="latent", length=1, topology=topology, rotary="anchor")
  found = reach(thought, given=False)
  assert [line[:T] for line in found["logp"]] == ["#.....", "##....", "###...", "####..", "....#."]
  assert all(line[T:] == "..." for lines in found.values() for line in lines)  # nothing was put in


@pytest.mark.parametrize("topology", leaving(["persistent", "private"], ["private"]))
def test_padding_and_other_documents_change_nothing_bit_for_bit(topology):
  thought = Sampled(topology=topology, lookahead=2 if topology == "private" else 0)
  run = jax.jit(
    lambda params, batch: rollout(problem.model(problem.UNTIED), thought, params, batch, LAYOUT, jax.random.key(3)),
  )
  run = functools.partial(run, problem.params(problem.UNTIED))
  before = run(BATCH)
  padding = run(BATCH.replace(tokens_BT=np.array([[0, 1, 2, 3, 4, 2]], np.int32)))
  other = run(BATCH.replace(tokens_BT=np.array([[0, 1, 2, 3, 1, 2]], np.int32)))
  for after, end in ((padding, 5), (other, 4)):
    thoughts = 3 if end == 5 else 2
    np.testing.assert_array_equal(after.logp_BGT[..., :end], before.logp_BGT[..., :end])
    for name in ("outcome_BGN", "policy_logp_BGN", "entropy_BGN"):
      np.testing.assert_array_equal(getattr(after, name)[..., :thoughts], getattr(before, name)[..., :thoughts])
  assert (other.logp_BGT[..., 4] != before.logp_BGT[..., 4]).all()


def test_future_tokens_change_no_drawn_thought():
  thought = ThoughtConfig(kind="sampled", length=2, topology="persistent", temperature=1.5)
  run = jax.jit(
    lambda params, tokens: (
      rollout(
        problem.model(), thought, params, BATCH.replace(tokens_BT=tokens), LAYOUT, jax.random.key(3)
      ).thoughts.tokens_BGNJ
    ),
  )
  run = functools.partial(run, problem.params())
  before = run(BATCH.tokens_BT)
  for seed in range(20):
    changed = BATCH.tokens_BT.copy()
    changed[0, 2:] = np.random.default_rng(seed).integers(0, problem.V, 4)
    np.testing.assert_array_equal(run(changed)[:, :, 0], before[:, :, 0])


def test_a_query_that_sees_nothing_is_finite():
  model, params = problem.model(), problem.params()

  def loss(params):
    decoder: Decoder = model.bind(params)
    hidden, _ = decoder(decoder.embed(jnp.array([[[1, 2]]])), jnp.arange(2)[None, None], jnp.zeros((1, 1, 2, 2), bool))
    return decoder.logits(hidden)[..., : problem.V].sum()

  value, gradient = jax.value_and_grad(loss)(params)
  assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
