"""The same loss and gradients on one device and on eight, for kinds and objectives of every sort."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.slow import leaving
from thinking_lm import experiment, recipes, sharding
from thinking_lm.analysis import collectives
from thinking_lm.errors import ConfigError
from thinking_lm.evaluation.evaluators import Runner, evaluate
from thinking_lm.model.generate import Sampling
from thinking_lm.objectives import carry
from thinking_lm.objectives.objective import ObjectiveConfig
from thinking_lm.training import loop
from thinking_lm.training.mesh import MeshConfig, everywhere, global_batch, make_mesh, shardings
from thinking_lm.training.step import gradients
from thinking_lm.types import Carried

SMALL = {
  "data.source": "task",
  "data.sequence_length": 0,
  "data.task.length": 8,
  "data.task.name": "word_problem",
  "model.layers": 1,
  "model.width": 16,
  "model.heads": 4,
  "model.kv_heads": 2,
}
PRIVATE = {"thought.topology": "private", "thought.lookahead": 2}
CHUNKED = {"model.attention_chunk": 3}
"""As long rows are by default."""
BOTH = dict(data=2, fsdp=2, tensor=2)
COPIES = dict(data=2, fsdp=4)
ALONG = dict(data=2, sequence=4)
CASES = {
  "pause along the sequence": ("pause", {}, ALONG),
  "pause by chunks of keys, along the sequence": ("pause", CHUNKED, ALONG),
  "private jepo along its streams": ("jepo", PRIVATE, ALONG),
  "private jepo by chunks of keys": ("jepo", PRIVATE | CHUNKED, dict(data=2, sequence=2, tensor=2)),
  "soft": ("soft", {}, COPIES),
  "sampled, drawn and scored": ("nll_only", {}, BOTH),
  "latent, one after another": ("latent", {"thought.length": 2}, BOTH),
  "latent, one after another, in copies": ("latent", {"thought.length": 2}, COPIES),
  "latent, in parallel passes": ("ponder_lm2", {}, dict(fsdp=4, tensor=2)),
  "latent, in parallel passes along the sequence": ("ponder_lm2", {}, ALONG),
  "sampled, scored along the sequence": ("nll_only", {}, ALONG),
  "private latent along its streams": ("latent", PRIVATE | {"thought.length": 2}, ALONG),
  "private gumbel": ("gumbel", PRIVATE, dict(data=2, fsdp=4)),
  "noisy, paid": ("hybrid", {"thought.kind": "noisy", "thought.samples": 2}, COPIES),
  "hybrid with STOP": ("hybrid", {"thought.halting": "stop", "thought.length": 2, "objective.price": 0.1}, BOTH),
  "ends that a head learns": ("catch_your_breath", {}, COPIES),
  "a spoken distribution": ("verbalised", {"thought.samples": 2}, dict(data=2, tensor=4)),
  "mixed predictions": ("quiet_star", {"thought.length": 2}, BOTH),
  "a value baseline": ("hybrid", {"objective.advantage": "value", "thought.samples": 1}, COPIES),
}
GATHERING = (
  "latent, in parallel passes along the sequence",
  "sampled, scored along the sequence",
  "private latent along its streams",
)
"""Cases that gather activations of the whole row in each pass of a loop. Their meshes split no weights."""

SLOW = (
  *GATHERING,
  "private jepo along its streams",
  "private jepo by chunks of keys",
  "sampled, drawn and scored",
  "soft",
  "private gumbel",
  "noisy, paid",
  "a spoken distribution",
  "ends that a head learns",
  "a value baseline",
  "latent, one after another, in copies",
  "mixed predictions",
)


@pytest.fixture(autouse=True)
def _in_stages(monkeypatch):
  """Rows and columns trade places as on a pod; four devices are the fewest that can in two stages."""
  monkeypatch.setattr(sharding, "STAGED", 4)


def small(recipe, **values):
  config = recipes.apply(experiment.default_config(), recipe)
  config.update_from_flattened_dict(SMALL | values)
  return experiment.build(experiment.parse(config))


def step(built):
  def one(params, batch):
    carried = Carried(extra=carry.init(built.config.objective, params))
    return gradients(built.loss_fn, params, batch, jax.random.key(2), 1, carried)

  return jax.jit(one)


@pytest.mark.parametrize("name", leaving(CASES, SLOW))
def test_one_device_and_eight(name):
  recipe, values, sizes = CASES[name]
  built = small(recipe, **values)
  params = built.init(jax.random.key(1))
  rows = next(built.data.batches("train", global_batch=8))
  grads, metrics = jax.device_get(step(built)(params, jax.tree.map(jnp.asarray, rows)))
  mesh = make_mesh(MeshConfig(**(dict(data=1) | sizes)))
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, shardings(built.axes, params, mesh))
    spread = global_batch(mesh, rows)
    program = step(built).lower(placed, spread).compile()
    many = jax.device_get(program(placed, spread))
  thought = built.config.thought
  atol = 1e-5 if thought.kind == "noisy" else 3e-6  # a density over all dimensions has large gradients that cancel
  scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=atol * scale), many[0], grads)
  np.testing.assert_allclose(many[1]["loss"].total, metrics["loss"].total, rtol=1e-5)
  if name in GATHERING:
    return
  gathers = collectives.read(program.as_text())[0]["all-gather"]
  # A draw needs the probabilities of the whole vocabulary, a lookup which tokens the rows of its copy have drawn, and
  # noise is added to a mixture; nothing else is gathered again and again.
  each = 2 if thought.kind_of.discrete or thought.kind == "noisy" else 1
  draws = each * rows.tokens_BT.shape[1] * thought.length if thought.kind_of.stochastic else 0
  assert gathers.runs - gathers.instructions <= draws, "a loop over think tokens gathers weights in every trip"


SHAPES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(sizes) == 8]


@pytest.fixture(scope="module")
def alone():
  """(the experiment, parameters, rows, gradients and metrics on one device) of pauses, eight heads to split."""
  built = small("pause", **{"model.heads": 8, "model.kv_heads": 8, "thought.placement": "stride", "thought.stride": 2})
  params = built.init(jax.random.key(1))
  rows = next(built.data.batches("train", global_batch=8))
  return built, params, rows, jax.device_get(step(built)(params, jax.tree.map(jnp.asarray, rows)))


@pytest.mark.parametrize(
  "data, fsdp, tensor, sequence", leaving(SHAPES, [sizes for sizes in SHAPES if sizes != (1, 2, 2, 2)])
)
def test_every_shape_of_a_mesh_of_eight(alone, data, fsdp, tensor, sequence):
  built, params, rows, (grads, metrics) = alone
  mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor, sequence=sequence))
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, shardings(built.axes, params, mesh))
    many, told = jax.device_get(step(built)(placed, global_batch(mesh, rows)))
  scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(grads))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=3e-6 * scale), many, grads)
  np.testing.assert_allclose(told["loss"].total, metrics["loss"].total, rtol=1e-5)


PAID = PRIVATE | {"thought.length": 2, "thought.samples": 2}
RELAXED = {"thought.topology": "private", "thought.lookahead": 2, "thought.relaxation": 2.0, "objective.control": 0.4}
PAST = {"objective.reward": "info_gain", "objective.teacher_decay": 0.9, "objective.kl_weight": 0.1, "train.updates": 2}
ONE_TERM = {"objective.score_weight": 0.0, "objective.advantage": ObjectiveConfig.advantage}
OBJECTIVES = {
  "all that is carried": (
    "hybrid",
    PAID | PAST | {"objective.advantage": "value", "objective.baseline_decay": 0.8},
    BOTH,
  ),
  "the same in copies": ("hybrid", PAID | PAST | {"objective.advantage": "value"}, COPIES),
  "a running mean": ("hybrid", PAID | {"objective.advantage": "ema"}, COPIES),
  "a greedy rollout": ("hybrid", PRIVATE | {"thought.samples": 1, "objective.advantage": "greedy"}, BOTH),
  "filtered groups": ("hybrid", PAID | {"objective.advantage": "dapo", "objective.nll_weight": 0.0}, COPIES),
  "M by vimco": ("jepo", PRIVATE | {"objective.advantage": "vimco"}, COPIES),
  "P": ("verifree", PRIVATE, BOTH),
  "all thoughts": ("hybrid", PRIVATE | {"thought.samples": 1, "objective.exact": True, **ONE_TERM}, COPIES),
  "REBAR": ("hybrid", RELAXED | {"thought.samples": 1, "objective.advantage": "none"}, COPIES),
  "RELAX": ("hybrid", RELAXED | {"objective.variate": "relax", "objective.control": 1.0}, COPIES),
  "sampled answers": ("rpt", {"thought.length": 2, "thought.samples": 2}, BOTH),
  "private streams along the sequence": ("hybrid", PAID, ALONG),
  "persistent streams along the sequence": ("hybrid", {"thought.samples": 2}, ALONG),
  "a router": ("hybrid", PRIVATE | {"thought.halting": "router", "thought.lookahead": 1}, COPIES),
}
"""Whole training steps: what a rollout alone does not have, or has for one objective only."""


def trained(built, mesh, steps=2):
  """(parameters, metrics) after a few steps of the run's own program."""
  run = built.run(mesh)
  with jax.set_mesh(mesh):
    made = loop.program(run, mesh)
    place = jax.tree.map(lambda leaf: leaf.sharding, made.state)
    state = jax.jit(made.init, out_shardings=place)(jax.random.key(1))
    batches = built.data.batches("train", global_batch=8)
    for _ in range(steps):
      state, metrics = made.step(state, global_batch(mesh, next(batches)), jax.random.key(2))
  return jax.device_get((state.params, metrics))


FAST = ("all that is carried", "private streams along the sequence")


@pytest.mark.parametrize("name", leaving(OBJECTIVES, [name for name in OBJECTIVES if name not in FAST]))
def test_training_steps_on_one_device_and_eight(name):
  recipe, values, sizes = OBJECTIVES[name]
  built = small(recipe, **values, **{"train.batch_size": 8, "optimizer.eps": 1e-4})
  alone = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  (params, metrics), (same, told) = (
    trained(built, mesh) for mesh in (make_mesh(MeshConfig(**({"data": 1} | sizes))), alone)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, same)
  assert metrics.keys() == told.keys()
  # Advantages of unit variance cancel in DAPO's loss, so that what is left has the rounding of its terms.
  atol = 1e-6 if built.config.objective.advantage == "dapo" else 0
  np.testing.assert_allclose(float(metrics["loss"]), float(told["loss"]), rtol=1e-5, atol=atol)


INFERENCE = {
  "private sampled thoughts": ("hybrid", PRIVATE | {"thought.length": 2}, BOTH),
  "persistent latent thoughts": ("latent", {"thought.length": 2}, COPIES),
}


@pytest.mark.parametrize("name", leaving(INFERENCE, ["persistent latent thoughts"]))
def test_decoding_and_evaluation_on_one_device_and_eight(name):
  recipe, values, sizes = INFERENCE[name]
  built = small(recipe, **values)
  params = built.init(jax.random.key(1))
  rows = next(built.data.batches("train", global_batch=8))
  prompts = jax.tree.map(lambda a: a[:, :4] if a.ndim == 2 else a, rows)

  def run(params, rows, prompts):
    runner, key = Runner(built), jax.random.key(2)
    thoughts = built.rollout(params, rows, key, thought=runner.thought).thoughts
    scored, without = runner.score(params, rows, key, thoughts), runner.without(params, rows)
    return built.decode(Sampling(6, samples=2))(params, prompts, key=key), thoughts, scored, without

  alone = jax.device_get(jax.jit(run)(params, *jax.tree.map(jnp.asarray, (rows, prompts))))
  mesh = make_mesh(MeshConfig(**({"data": 1} | sizes)))
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, shardings(built.axes, params, mesh))
    many = jax.device_get(jax.jit(run)(placed, global_batch(mesh, rows), global_batch(mesh, prompts)))
  assert len({row.tobytes() for row in alone[0].tokens_BX}) > 1
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), many, alone)


def test_evaluation_and_generation_run_on_the_mesh_of_their_parameters(monkeypatch):
  """Nobody set it: outside of it no constraint would be heard, and the program another one than a plan compiles."""
  built, mesh = small("hybrid", **PRIVATE), everywhere()
  placed = jax.device_put(built.init(jax.random.key(1)), shardings(built.axes, built.model.shapes, mesh))

  class Traced(Exception):
    pass

  def traced(*_, **__):
    raise Traced(sharding.ways("batch"))

  for name in ("rollout", "generate"):
    monkeypatch.setattr(experiment, name, traced)
  put = functools.partial(global_batch, mesh)
  with pytest.raises(Traced, match="8"):
    evaluate(built, placed, "validation", key=jax.random.key(2), batch_size=8, put=put)
  with pytest.raises(Traced, match="8"):
    built.generate(placed, [b"012 021", b"102"], jax.random.key(2), Sampling(4))


def test_draws_can_be_traced_where_many_devices_trade_places_in_stages(monkeypatch):
  built, mesh = small("hybrid", **PRIVATE), everywhere()
  monkeypatch.setattr(sharding, "STAGED", mesh.size)
  keys = jax.random.split(jax.random.key(2), 3)
  with jax.set_mesh(mesh):
    rows = global_batch(mesh, next(built.data.batches("train", global_batch=8)))
    traced = jax.make_jaxpr(Runner(built).draw)(built.model.shapes, rows, keys)
  assert "all_to_all" in str(traced) and traced.out_avals[0].shape == (3, *rows.tokens_BT.shape)


def test_what_thinks_slot_after_slot_is_not_split_along_its_row():
  ends = {"thought.halting": "entropy"}
  for recipe, values in (("latent", {}), ("pause", ends), ("nll_only", {"thought.rescore": False})):
    with pytest.raises(ConfigError, match=r"mesh.sequence 4 splits a row.*tensor"):
      small(recipe, **{"mesh.sequence": 4}, **values)
  for recipe, values in (("latent", {**PRIVATE}), ("pause", {}), ("none", {}), ("nll_only", {})):
    assert small(recipe, **{"mesh.sequence": 4}, **values).config.mesh.sequence == 4
