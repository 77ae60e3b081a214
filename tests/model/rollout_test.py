"""The rollout against the float64 oracle: values and gradients, for every kind, topology and placement.

The rows of `problem.BATCH` are one for each placement, packed and not, so that each (kind, topology) pair is compiled
once and all its placements are compared.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracles, traced
from tests.model import problem
from tests.model.problem import ANCHORS, BATCH, TIED, UNTIED
from tests.slow import leaving
from thinking_lm.model.rollout import rollout
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Thoughts

Thought = functools.partial(ThoughtConfig, length=2)
PERSISTENT = dict(
  plain=(UNTIED, ThoughtConfig(length=0)),
  pause=(TIED, Thought(kind="pause", delimiters=True, rotary="anchor")),
  latent=(UNTIED, Thought(kind="latent", lookahead=0)),
  latent_anchor=(TIED, Thought(kind="latent", delimiters=True, rotary="anchor", lookahead=2)),
  soft=(TIED, Thought(kind="soft", delimiters=True, top_k=3, temperature=0.7, lookahead=2)),
  noisy=(TIED, Thought(kind="noisy", samples=2, temperature=0.7, lookahead=2)),
  gumbel=(UNTIED, Thought(kind="gumbel", samples=2, rotary="anchor", temperature=0.5)),
  sampled=(TIED, Thought(kind="sampled", samples=2, delimiters=True, temperature=1.3, lookahead=2)),
  scanned=(TIED, Thought(kind="sampled", samples=2, delimiters=True, temperature=1.3, lookahead=2, rescore=False)),
)
Private = functools.partial(Thought, topology="private")
PRIVATE = dict(
  pause=(UNTIED, Private(kind="pause", lookahead=2)),
  latent=(TIED, Private(kind="latent", delimiters=True, rotary="anchor", lookahead=2)),
  latent_linear=(UNTIED, Private(kind="latent")),
  soft=(UNTIED, Private(kind="soft", rotary="anchor")),
  noisy=(TIED, Private(kind="noisy", top_k=3, delimiters=True, rescore=False)),
  gumbel=(TIED, Private(kind="gumbel", samples=2, delimiters=True, lookahead=2)),
  sampled=(UNTIED, Private(kind="sampled", samples=2, temperature=0.7, lookahead=2)),
  sampled_delimited=(TIED, Private(kind="sampled", samples=2, delimiters=True, rotary="advance")),
  scanned=(UNTIED, Private(kind="sampled", samples=2, temperature=0.7, lookahead=2, rescore=False)),
)
CASES = {f"persistent-{name}": case for name, case in PERSISTENT.items()}
CASES |= {f"private-{name}": case for name, case in PRIVATE.items()}
SLOW = (
  *("persistent-scanned", "persistent-latent_anchor", "private-latent_linear", "private-sampled_delimited"),
  *("private-soft", "private-gumbel", "persistent-noisy", "private-scanned", "persistent-soft", "private-pause"),
  *("persistent-plain", "private-latent", "persistent-gumbel"),
)


@functools.cache
def rolled(name):
  """((number, trace), gradient) of the rollout, as numpy."""
  config, thought = CASES[name]
  assert not thought.faults() and not config.faults()
  layout = problem.layout() if thought.length else problem.layout([[]] * len(ANCHORS), block=problem.T)
  run = problem.compiled(config, thought)
  return jax.device_get(run(problem.params(config), BATCH, layout, problem.cotangents(thought)))


@functools.cache
def expected(name):
  """((number, values), gradient) of the oracle, given the same random numbers."""
  config, thought = CASES[name]
  (_, trace), _ = rolled(name)
  tokens = trace.thoughts.tokens_BGNJ.tolist()
  noise = [[[[None] * thought.length for _ in row] for _ in range(thought.samples)] for row in ANCHORS]
  draws = dict(gumbel=(jax.random.gumbel, problem.V + 3, problem.V), noisy=(jax.random.normal, *[config.width] * 2))
  if thought.kind in draws:
    draw, *sizes = draws[thought.kind]
    noise = oracles.drawn_noise(draw, problem.KEY, BATCH.ids_B, thought.samples, ANCHORS, thought.length, *sizes)
  cotangents = problem.cotangents(thought)

  def number(params):
    found = problem.oracle(config, thought, params, tokens, noise)
    return sum(cotangents[what][at] * value for (what, at), value in found.items() if what in cotangents), found

  with jax.enable_x64(True):
    return jax.device_get(jax.value_and_grad(number, has_aux=True)(oracles.wide(problem.params(config))))


def same_trace(left, right, thought):
  """Two traces agree wherever there is something to compare."""
  cotangents = problem.cotangents(thought)
  left, right = problem.outputs(left, thought), problem.outputs(right, thought)
  for what in left:
    real = cotangents[what] != 0
    np.testing.assert_allclose(left[what][real], right[what][real], rtol=2e-5, atol=2e-5, err_msg=what)


def same_gradient(left, right, rtol=1e-4):
  """Leaf by leaf, by the norm of the difference."""
  for path, leaf in jax.tree.leaves_with_path(left):
    other = functools.reduce(lambda tree, key: tree[key.key], path, right)
    error, size = np.linalg.norm(leaf - other), np.linalg.norm(other)
    assert error <= rtol * size, f"{jax.tree_util.keystr(path)}: {error} of {size}"


@pytest.mark.parametrize("name", leaving(CASES, SLOW))
def test_values_and_gradients_equal_the_oracles(name):
  _, thought = CASES[name]
  (number, trace), gradient = rolled(name)
  (same, found), wanted = expected(name)
  got = problem.outputs(trace, thought) | dict(hit=trace.hit_BGT)
  got |= dict(inputs=trace.thoughts.inputs_BGNJD, tokens=trace.thoughts.tokens_BGNJ)
  assert {what for what, _ in found} == (set(got) if thought.length else {"logp", "hit"})
  for (what, at), value in found.items():
    np.testing.assert_allclose(got[what][at], np.asarray(value), rtol=2e-5, atol=2e-5, err_msg=f"{what} {at}")
  np.testing.assert_allclose(number, same, rtol=1e-4)
  same_gradient(gradient, wanted, rtol=5e-5)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((trace, gradient)))


def test_what_does_not_exist_weighs_nothing():
  (_, trace), _ = rolled("private-sampled")
  invalid_BN = ~trace.valid_BN
  assert invalid_BN.any() and not (trace.valid_BN & (problem.layout().anchors_BN == problem.T)).any()
  for leaf in (trace.outcome_BGN, trace.policy_logp_BGN, trace.entropy_BGN, trace.used_BGN):
    assert not np.moveaxis(leaf, 1, 2)[invalid_BN].any()
  assert (trace.used_BGN == 2 * trace.valid_BN[:, None]).all()
  inside = problem.inside(BATCH, ANCHORS, 2, problem.T)
  ahead = np.array(
    [
      [[w[min(a + 1, problem.T - 1)]] for a in row]
      for w, row in zip(BATCH.weights_BT, problem.layout().anchors_BN, strict=True)
    ]
  )
  np.testing.assert_array_equal(trace.ahead_weights_BNA, ahead * inside)


@pytest.mark.parametrize("topology", leaving(["persistent", "private"], ["private"]))
def test_scoring_in_parallel_equals_differentiating_the_scan(topology):
  _, thought = CASES[f"{topology}-sampled"]
  (_, trace), gradient = rolled(f"{topology}-sampled")
  (_, scanned), scanned_gradient = rolled(f"{topology}-scanned")
  np.testing.assert_array_equal(trace.thoughts.tokens_BGNJ, scanned.thoughts.tokens_BGNJ)
  assert (trace.thoughts.tokens_BGNJ < problem.V).all()
  same_trace(trace, scanned, thought)
  same_gradient(gradient, scanned_gradient)


@pytest.mark.parametrize("name", ["persistent-latent_anchor", "private-scanned"])
def test_own_thoughts_put_back_in_give_the_same_trace(name):
  config, thought = CASES[name]
  (_, trace), _ = rolled(name)
  again = jax.jit(functools.partial(rollout, problem.model(config), thought))
  other_key = jax.random.key(0)
  back = jax.device_get(again(problem.params(config), BATCH, problem.layout(), other_key, trace.thoughts))
  same_trace(trace, back, thought)
  np.testing.assert_array_equal(trace.thoughts.tokens_BGNJ, back.thoughts.tokens_BGNJ)


def test_what_is_drawn_depends_on_the_example_the_sample_and_the_anchor_only():
  # Neither on the other rows of the batch, nor on the anchors before it (a private thought does not see them).
  config, thought = CASES["private-sampled"]
  (_, trace), _ = rolled("private-sampled")
  rows = np.array([2, 0])
  anchors = [ANCHORS[row][1:] for row in rows]
  fewer = jax.tree.map(lambda leaf: leaf[rows], BATCH)
  run = jax.jit(functools.partial(rollout, problem.model(config), thought))
  alone = jax.device_get(run(problem.params(config), fewer, problem.layout(anchors), problem.KEY)).thoughts.tokens_BGNJ
  drawn = trace.thoughts.tokens_BGNJ
  for number, row in enumerate(rows):
    count = len(anchors[number])
    np.testing.assert_array_equal(alone[number, :, :count], drawn[row, :, 1 : count + 1])
  assert (drawn[0, 0] != drawn[0, 1]).any()  # samples differ
  assert (drawn[0, :, 1:] != drawn[0, :, :-1]).any()
  other = jax.device_get(run(problem.params(config), fewer, problem.layout(anchors), jax.random.key(1)))
  assert (other.thoughts.tokens_BGNJ != alone).any()


@pytest.mark.parametrize("topology", leaving(["persistent", "private"], ["private"]))
def test_a_greedy_thought_is_the_most_likely_token_after_each_slot(topology):
  thought = Thought(kind="sampled", topology=topology, temperature=0.0)
  run = jax.jit(functools.partial(rollout, problem.model(), thought))
  first, second = (
    jax.device_get(run(problem.params(), BATCH, problem.layout(), jax.random.key(seed))) for seed in (0, 1)
  )
  np.testing.assert_array_equal(first.thoughts.tokens_BGNJ, second.thoughts.tokens_BGNJ)
  assert not first.policy_logp_BGN.any() and not first.entropy_BGN.any()
  # The same thoughts at temperature 1: each first token is at least as likely as any other in its place.
  scored = dataclasses.replace(thought, temperature=1.0, length=1)
  score = jax.jit(functools.partial(rollout, problem.model(), scored))
  start = first.thoughts.tokens_BGNJ[:, :, :1, :1]  # of the first anchor: in its past nothing is different
  only = problem.layout([row[:1] for row in ANCHORS])

  def policy(tokens):
    inputs = problem.model().bind(problem.params()).embed(jnp.asarray(tokens))
    return score(problem.params(), BATCH, only, problem.KEY, Thoughts(inputs, jnp.asarray(tokens))).policy_logp_BGN

  best = policy(start)
  assert all((policy(np.full_like(start, token)) <= best).all() for token in range(problem.V))


LONG = 256


@pytest.mark.parametrize(
  "thought",
  [PERSISTENT["plain"][1], Thought(kind="pause"), *(Private(kind=kind) for kind in ("pause", "latent", "sampled"))],
  ids=lambda thought: f"{thought.topology}-{thought.kind}-{thought.length}",
)
def test_nothing_has_an_entry_for_each_query_key_and_head_where_attention_goes_by_chunks(thought):
  def largest(attention):
    model = problem.model(dataclasses.replace(TIED, kv_heads=2, attention=attention, attention_chunk=16))
    batch, layout = problem.pack(np.zeros((1, LONG)), [(LONG,)]), problem.layout([list(range(LONG))], 1, LONG)

    def total(params):
      trace = rollout(model, thought, params, batch, layout, problem.KEY)
      return trace.logp_BGT.sum() + trace.policy_logp_BGN.sum()

    return max(a.size for a in traced.arrays(jax.make_jaxpr(jax.grad(total))(model.shapes).jaxpr))

  keys = LONG * (1 + thought.length) if thought.topology == "persistent" else LONG
  assert largest("auto") == keys**2, "the mask, of the queries of a stream together"
  assert largest("einsum") > keys**2
