"""The ledger against XLA's own count, on models where every loop runs once (XLA counts a loop's body once), and against
the matrix products of programs with loops, every trip counted."""

import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from tests import traced
from tests.slow import leaving
from thinking_lm import experiment
from thinking_lm.analysis import chips
from thinking_lm.analysis.flops import causal_keys, ledger
from thinking_lm.analysis.training import training_ledger
from thinking_lm.model.decoder import Model, ModelConfig
from thinking_lm.model.rollout import rollout
from thinking_lm.objectives.carry import init
from thinking_lm.thoughts.placement import place
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Batch, Carried, Vocabulary

V, T, B = 253, 32, 2
VOCABULARY = Vocabulary(V, 4, np.ones(V, np.int32), np.zeros(V, np.int8))
CONFIG = ModelConfig(layers=1, width=256, heads=4, kv_heads=2)
CASES = [
  dict(length=0),
  dict(kind="pause"),
  dict(kind="latent"),
  dict(kind="gumbel", topology="private"),
  dict(kind="sampled", samples=2, rescore=False),
  dict(kind="sampled", samples=2, topology="private"),
  dict(kind="sampled", samples=2, topology="private", placement="every"),
  dict(kind="sampled", samples=2, topology="private", placement="every", mixing="probability"),
  dict(kind="latent", topology="private", placement="every", halting="ponder"),
  dict(kind="pause", topology="private", placement="every", halting="ponder", mixing="logit"),
  dict(kind="latent", topology="private", placement="every", halting="entropy"),
]
ANSWERS = [dict(kind="sampled", samples=2, topology="private", placement="every", answer=m) for m in (1, 2)]
GRADIENTS = [
  (dict(length=0), "none"),
  (dict(length=0), "full"),
  (dict(kind="pause"), "full"),
  (dict(length=2), "none"),  # serial streams and drawn private thoughts have a backward pass of their own
  (CASES[5], "none"),
  (CASES[6], "full"),
  (CASES[7], "none"),
  (CASES[8], "none"),
  (CASES[10], "none"),
  (dict(length=2), "full"),
  (CASES[5], "full"),
  (CASES[6], "none"),
  *((answer, "none") for answer in ANSWERS),
]
"""Thoughts, and remat."""


def named(options):
  """Of parameters that are dicts."""
  return "-".join(map(str, options.values())) if isinstance(options, dict) else None


def program(thought, gradient, config=CONFIG):
  """(the value of one batch, or that with its gradient, as a function; the shapes of its arguments)."""
  heads = [name for name, asked in (("mix", thought.mixing != "none"), ("halt", thought.learns_end)) if asked]
  model = Model(config, V, heads=tuple(heads))
  tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
  batch = Batch(
    *[tokens] * 2, jax.ShapeDtypeStruct((B, T), jnp.float32), *[tokens] * 2, jax.ShapeDtypeStruct((B,), jnp.uint32)
  )

  def total(params, batch):
    trace = rollout(model, thought, params, batch, place(batch, thought, VOCABULARY, aligned=0), jax.random.key(0))
    ends = 0.0 if trace.exit_logp_BGNK is None else (trace.exit_logp_BGNK * trace.exit_outcome_BGNK).sum()
    return trace.logp_BGT.sum() + trace.policy_logp_BGN.sum() + ends

  return (jax.value_and_grad(total) if gradient else total), (model.shapes, batch)


def counted(thought, gradient, config=CONFIG, merged=True):
  """XLA's FLOPs of one batch, of the value alone or with its gradient.

  merged: as it is compiled, when equal expressions have become one; else of the program before.
  """
  function, shapes = program(thought, gradient, config)
  lowered = jax.jit(function).lower(*shapes)
  return (lowered.compile() if merged else lowered).cost_analysis()["flops"]


def products(jaxpr):
  """FLOPs of the matrix products of a program, a loop's as often as it runs."""
  total = 0
  for one in jaxpr.eqns:
    assert one.primitive.name != "while", "its trips are not known"
    if one.primitive.name == "dot_general":
      (contracted, _), _ = one.params["dimension_numbers"]
      total += 2 * math.prod(one.invars[0].aval.shape[axis] for axis in contracted) * one.outvars[0].aval.size
    total += one.params.get("length", 1) * sum(map(products, traced.inner(one)))
  return total


LOOPS = [
  dict(length=0),
  dict(length=4),
  dict(length=3, placement="stride", stride=8),
  dict(kind="sampled", length=4, placement="stride", stride=8),
  dict(kind="sampled", length=4, placement="stride", stride=8, rescore=False),
  dict(kind="soft", length=2, iterations=5),
  dict(kind="latent", length=3, topology="private"),
  dict(kind="sampled", length=3, topology="private", samples=4, answer=3, lookahead=2),
  dict(kind="noisy", length=3, topology="private", samples=4),
]


@pytest.mark.parametrize("options", LOOPS, ids=named)
def test_products_with_every_trip_of_every_loop_within_two_percent(options):
  """What JAX is asked for, without what nothing needs; three layers."""
  config = dataclasses.replace(CONFIG, layers=3)
  thought = ThoughtConfig(**dict(placement="every") | options)
  function, shapes = program(thought, True, config)
  asked = jax.make_jaxpr(function)(*shapes).jaxpr
  needed = partial_eval.dce_jaxpr(asked, [True] * len(asked.outvars))[0]
  ours = ledger(config, V, thought, T, aligned=0, gradient=True)
  np.testing.assert_allclose(products(needed), B * ours.total, rtol=0.02)


def test_query_blocks_skip_keys():
  blocks = dataclasses.replace(CONFIG, query_blocks=3)
  ends = [11] * 11 + [22] * 11 + [32] * 10  # of T = 32 queries
  assert causal_keys(CONFIG, T) == T and causal_keys(blocks, 5) == 5
  assert causal_keys(blocks, T) == sum(ends) / T
  thought = ThoughtConfig(length=0)
  ours = ledger(blocks, V, thought, T, aligned=0, gradient=False)
  np.testing.assert_allclose(counted(thought, False, blocks), B * ours.total, rtol=0.02)


@pytest.mark.parametrize("options", CASES, ids=named)
def test_forward_within_two_percent(options):
  thought = ThoughtConfig(**dict(length=1, placement="stride", stride=T) | options)
  ours = ledger(CONFIG, V, thought, T, aligned=0, gradient=False)
  np.testing.assert_allclose(counted(thought, gradient=False), B * ours.total, rtol=0.02)


@pytest.mark.parametrize("options, remat", leaving(GRADIENTS, [GRADIENTS[4], *GRADIENTS[8:]]), ids=named)
def test_with_gradient_within_two_percent(options, remat):
  config = dataclasses.replace(CONFIG, remat=remat)
  thought = ThoughtConfig(**dict(length=1, placement="stride", stride=T) | options)
  ours = ledger(config, V, thought, T, aligned=0, gradient=True)
  np.testing.assert_allclose(counted(thought, True, config), B * ours.total, rtol=0.02)


@pytest.mark.parametrize("kind", ["latent", "sampled"])
def test_a_serial_thought_of_one_token_within_two_percent_before_xla_merges(kind):
  """With no loop between them it makes one of the layers that run again and those that ran: 0.78 would be left."""
  thought = ThoughtConfig(kind=kind, length=1, placement="stride", stride=T, rescore=False)
  ours = ledger(CONFIG, V, thought, T, aligned=0, gradient=True)
  np.testing.assert_allclose(counted(thought, True, merged=False), B * ours.total, rtol=0.02)


def test_what_a_thought_adds():
  """Thoughts are counted once for each anchor and sample, and the plain decoder has none."""
  plain = ledger(CONFIG, V, ThoughtConfig(length=0), T, aligned=0, gradient=False)
  assert plain.think == plain.draw == 0
  one, four = (
    ledger(
      CONFIG, V, ThoughtConfig(length=2, kind="sampled", topology="private", samples=G), T, aligned=0, gradient=False
    )
    for G in (1, 4)
  )
  assert one.base == four.base == plain.base
  np.testing.assert_allclose(four.think, 4 * one.think)
  np.testing.assert_allclose(four.readout - plain.readout, 4 * (one.readout - plain.readout))


def step(changes, updates=1):
  """(XLA's FLOPs of a training step's loss and gradients, the ledger) on two rows of which one anchor each thinks."""
  values = experiment.default_config()
  values.update_from_flattened_dict(
    {"data.source": "task", "data.task.name": "last_letter", "data.task.length": 4, "data.sequence_length": 0}
    | {"model.layers": 1, "model.width": 256, "train.batch_size": 2, "thought.kind": "sampled", "thought.length": 1}
    | {"thought.topology": "private", "thought.placement": "explicit", "thought.positions": (15,)}
    | changes
  )
  values.train.updates = updates
  built = experiment.build(experiment.parse(values))
  batch = next(built.data.batches("train", global_batch=2))
  key, carry = jax.random.key(0), functools.partial(init, built.config.objective)
  carried = Carried(extra=jax.eval_shape(carry, built.model.shapes))
  if updates > 1:
    drawn = jax.eval_shape(built.draw, built.model.shapes, batch, key, carried)
  of = lambda function, *a: jax.jit(function).lower(built.model.shapes, batch, *a).compile().cost_analysis()["flops"]
  loss = lambda params, batch, carried: built.loss_fn(params, batch, key, carried)[0]
  got = of(jax.value_and_grad(loss), carried if updates == 1 else carried.replace(drawn=drawn))
  if updates > 1:
    got = updates * got + of(lambda params, batch, carried: built.draw(params, batch, key, carried), carried)
  proxy = built.proxy and built.proxy[0].config
  return got, training_ledger(built.config, built.data.vocabulary.size, built.data.sequence_length, proxy)


WORDS = {"data.task.name": "word_problem", "data.task.length": 16}
SCORED = {"objective.score_weight": 1.0, "thought.samples": 2}
IN_CONTEXT = {"thought.topology": "persistent", "thought.lookahead": 0}


@pytest.mark.parametrize(
  "changes",
  [
    WORDS | {"objective.exact": True},  # 7 thoughts in one part
    SCORED | {"objective.control": 0.5, "thought.relaxation": 2.0},
    WORDS | SCORED | {"objective.control": 1.0, "objective.variate": "relax", "thought.relaxation": 2.0},
  ],
)
def test_every_thought_and_relaxed_copies_within_two_percent(changes):
  got, ours = step(changes)
  np.testing.assert_allclose(got, ours.total, rtol=0.02)


PAUSE = {"thought.kind": "pause"}
BESIDE = dict(
  need=(PAUSE, {"thought.placement": "entropy", "thought.room": 1}),
  teacher=(SCORED, {"objective.reward": "info_gain", "objective.teacher_decay": 0.9}),
  compared=(SCORED | IN_CONTEXT, {"objective.reward": "info_gain"}),
  greedy=(SCORED | IN_CONTEXT, {"objective.advantage": "greedy"}),
  reference=(SCORED | IN_CONTEXT, {"objective.kl_weight": 0.1}),
)
"""Objectives and what adds a pass to them, where XLA does not find it equal to another one (as it does with one layer
and the same parameters, once no loop is left)."""


@functools.cache
def plain(changes):
  """`step` of what has no pass beside; changes: their items."""
  return step(dict(changes))


@pytest.mark.parametrize("name", leaving(BESIDE, ["compared", "greedy", "teacher"]))
def test_passes_beside_within_two_percent(name):
  common, more = BESIDE[name]
  (got, ours), (before, without) = step(common | more), plain(tuple(common.items()))
  assert ours.beside > 0.1 * ours.total and without.beside == 0
  np.testing.assert_allclose(got - before, ours.beside, rtol=0.02)
  np.testing.assert_allclose(got, ours.total, rtol=0.02)


def test_several_updates_within_two_percent():
  got, ours = step(SCORED | IN_CONTEXT, updates=3)
  np.testing.assert_allclose(got, ours.total, rtol=0.02)


def test_the_peak_is_of_devices_that_the_table_knows():
  Device = collections.namedtuple("Device", "device_kind")
  assert chips.peak([Device("TPU v5 lite")] * 2) == 2 * chips.CHIPS["v5e"].flops
  assert chips.peak(jax.devices()) == chips.peak([Device("TPU v5 lite"), Device("cpu")]) == 0.0


def test_parallel_iterations_are_passes_over_all_slots():
  one = ThoughtConfig(kind="soft", length=2, iterations=1)
  row = functools.partial(ledger, CONFIG, V, T=T, aligned=0)
  once, forward = row(thought=one, gradient=True), row(thought=one, gradient=False)
  layers = once.base + once.think
  three, last = (row(thought=dataclasses.replace(one, iterations=3, through=k), gradient=True) for k in (0, 1))
  make = forward.draw
  assert make == T * 2 * 4.0 * CONFIG.width * (V + 3) and forward.total == layers + once.readout + make
  assert three.forward == forward.total + 2 * (layers + make)
  assert three.backward - once.backward == 2 * 2 * (layers + make) and last.backward == once.backward
