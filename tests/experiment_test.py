"""The parts wired together: every config, every recipe, and numbers that do not depend on how a step is cut."""

import dataclasses
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.slow import leaving
from thinking_lm import experiment, recipes
from thinking_lm.config import parse
from thinking_lm.errors import ConfigError
from thinking_lm.training import mesh as mesh_lib
from thinking_lm.training.step import gradients
from thinking_lm.types import Carried

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
SMALL = {
  "data.source": "task",
  "data.sequence_length": 0,
  "data.task.length": 5,
  "data.task.name": "word_problem",
  "model.layers": 2,
  "model.width": 16,
  "model.heads": 4,
  "model.kv_heads": 2,
}


def small(recipe, **values):
  config = recipes.apply(experiment.default_config(), recipe)
  config.update_from_flattened_dict(SMALL | values)
  return experiment.build(experiment.parse(config))


def first(built, rows=8):
  batch = next(built.data.batches("train", global_batch=rows))
  return jax.tree.map(jnp.asarray, batch)


PAIRS = {f"{file.stem}-{recipe}": (file, recipe) for file in CONFIGS for recipe in recipes.RECIPES}
SLOW = [name for name, (file, recipe) in PAIRS.items() if file.stem != "word_problem" and recipe != "hybrid"]
"""`make test` takes one file with every recipe, and every file with one of them."""


@pytest.mark.parametrize("pair", leaving(PAIRS, SLOW))
def test_every_config_builds_with_every_recipe(pair):
  file, recipe = PAIRS[pair]
  values = runpy.run_path(str(file))["get_config"](recipe)
  if values.data.source == "verdicts":  # whose rows another run makes
    values.data.input = "nowhere"
    built = experiment.sketch(experiment.parse(values))
    batch = mesh_lib.abstract_batch(mesh_lib.make_mesh(mesh_lib.MeshConfig()), 2, 64)
  else:
    built = experiment.build(experiment.parse(values))
    batch = first(built, 2)
  loss, metrics = jax.eval_shape(built.loss_fn, built.model.shapes, batch, jax.random.key(0), Carried())
  assert loss.shape == () and metrics["loss"].count.shape == ()
  assert runpy.run_path(str(file))["__doc__"].count("\n") > 3, "a config file is a lab protocol"


def everything(built, parts=1):
  """(gradients, metrics, drawn tokens) of a step, compiled."""

  def step(params, batch):
    tokens = built.rollout(params, batch, jax.random.key(2)).thoughts.tokens_BGNJ
    return *gradients(built.loss_fn, params, batch, jax.random.key(2), parts, Carried()), tokens

  return jax.jit(step)


@pytest.fixture(scope="module", params=leaving(["latent", "hybrid"], ["latent"]))
def reference(request):
  options = {"thought.topology": "private", "thought.lookahead": 2} if request.param == "hybrid" else {}
  built = small(request.param, **options)
  params, batch = built.init(jax.random.key(1)), first(built)
  return built, params, batch, everything(built)(params, batch)


def close(got, expected):
  (grads, metrics, tokens), (same, before, drawn) = jax.device_get((got, expected))
  scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(same))
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(same), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6 * scale)
  assert metrics["loss"].count == before["loss"].count
  np.testing.assert_allclose(metrics["loss"].total, before["loss"].total, rtol=1e-5)
  np.testing.assert_array_equal(tokens, drawn)


MESHES = dict(fsdp=dict(fsdp=8), all_three=dict(data=2, fsdp=2, tensor=2))


def test_numbers_do_not_depend_on_micro_batches(reference):
  built, params, batch, expected = reference
  close(everything(built, parts=4)(params, batch), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_numbers_do_not_depend_on_the_mesh(reference, name):
  built, params, batch, expected = reference
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(**(dict(data=-1) | MESHES[name])))
  placed = jax.device_put(params, mesh_lib.shardings(built.axes, params, mesh))
  rows = mesh_lib.global_batch(mesh, jax.tree.map(np.asarray, batch))
  with jax.set_mesh(mesh):
    close(everything(built)(placed, rows), expected)


def test_the_second_step_compiles_nothing():
  built = small("hybrid")
  step = jax.jit(lambda p, b, key: gradients(built.loss_fn, p, b, key, 2, Carried()))
  params, batches = built.init(jax.random.key(0)), built.data.batches("train", global_batch=4)
  for number in range(3):
    params, _ = step(params, jax.tree.map(jnp.asarray, next(batches)), jax.random.key(number))
  assert step._cache_size() == 1


def test_bfloat16_is_close_and_keeps_float32_where_it_matters():
  full, half = (small("latent", **{"model.compute_dtype": dtype}) for dtype in ("float32", "bfloat16"))
  params, batch = full.init(jax.random.key(0)), first(full)
  losses = [
    jax.jit(lambda p, b, f=f: f.loss_fn(p, b, jax.random.key(0), Carried())[0])(params, batch) for f in (full, half)
  ]
  assert losses[1].dtype == jnp.float32
  np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)
  grads = jax.eval_shape(jax.grad(lambda p: half.loss_fn(p, batch, jax.random.key(0), Carried())[0]), params)
  assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_all_faults_are_listed_at_once():
  config = recipes.apply(experiment.default_config(), "latent")
  config.model.heads = 3
  config.optimizer.learning_rate = float("nan")
  config.objective.score_weight = 1.0
  config.thought.samples = 4
  config.thought.kind = "latnet"
  with pytest.raises(ConfigError) as caught:
    experiment.parse(config)
  text = str(caught.value)
  for part in ("128 does not divide into 3 heads", "learning_rate must be finite", "unknown name 'latnet'"):
    assert part in text
  config.thought.kind = "latent"
  config.model.heads = 4
  config.optimizer.learning_rate = 1e-3
  with pytest.raises(ConfigError, match="would all be equal"):
    experiment.parse(config)


def test_the_mesh_is_checked_with_everything_else():
  config = experiment.default_config()
  config.mesh.tensor = 3
  config.model.heads = 3
  with pytest.raises(ConfigError) as caught:
    experiment.parse(config, here=True)
  assert "128 does not divide into 3 heads" in str(caught.value) and "does not fit the 8 devices" in str(caught.value)
  config.mesh.tensor, config.model.heads, config.train.batch_size = 1, 4, 12
  with pytest.raises(ConfigError, match="batch_size 12 is not a multiple"):
    experiment.parse(config, here=True)
  assert experiment.parse(config).train.batch_size == 12, "a config may be looked at on other devices"


def test_a_backend_of_attention_runs_here_or_is_refused_before_anything_is_allocated():
  config = experiment.default_config()
  for backend, wanted in (("splash", "tpu"), ("cudnn", "gpu")):
    config.model.attention, config.model.compute_dtype = backend, "bfloat16"
    with pytest.raises(
      ConfigError, match=f"{backend}' runs on {wanted} only, this job has cpu: use auto, einsum, chunked"
    ):
      experiment.parse(config, here=True)
    elsewhere = experiment.parse(config).model
    assert elsewhere.attention == backend, "a config may be looked at on other devices"
    assert elsewhere.runnable("cpu").attention == "chunked" and elsewhere.runnable(wanted) is elsewhere
  config.model.attention = "splahs"
  with pytest.raises(ConfigError, match="attention: unknown name 'splahs'; known: auto, einsum, chunked"):
    experiment.parse(config, here=True)


RULES = [
  ({"objective.score_weight": 1.0}, "needs thoughts with a log-probability"),
  ({"objective.score_weight": 1.0, "thought.kind": "sampled", "thought.length": 1}, "samples of at least 2, got 1"),
  (
    {"objective.score_weight": 1.0, "thought.kind": "sampled", "thought.length": 1, "thought.temperature": 0.0},
    "a greedy thought has no gradient",
  ),
  ({"objective.base_weight": 1.0}, "there is no pass without"),
  ({"objective.base_weight": 1.0, "thought.topology": "private"}, "without thoughts nll_weight weighs the same"),
  ({"objective.price": 0.5}, "score_weight is 0"),
  ({"thought.length": 1, "thought.placement": "stride", "thought.stride": 500}, "no thought fits into rows"),
  ({"thought.length": 1, "thought.kind": "sampled", "thought.temperature": 0.0, "thought.samples": 2}, "would all be"),
  ({"thought.top_k": 3}, "top_k is read by kinds 'soft' and 'noisy' only"),
  ({"thought.noise": 0.1}, "noise is read by kind 'noisy' only"),
  ({"objective.halt_prior": 0.5}, "objective.halt_prior is read by thought.halting ponder and router, got 'fixed'"),
  ({"objective.scoring": "spherical"}, "objective.scoring 'spherical' judges what a thought reports"),
  (
    {"thought.length": 2, "thought.kind": "sampled", "thought.halting": "stop"},
    "thought.halting 'stop' is a part of it that nothing teaches: objective.score_weight is 0",
  ),
  ({"thought.temperature": -1.0, "train.steps": 30, "optimizer.warmup_steps": 40}, "do not fit into train.steps 30"),
]


@pytest.mark.parametrize("values,message", RULES)
def test_rules_across_sections(values, message):
  config = experiment.default_config()
  config.update_from_flattened_dict(values)
  with pytest.raises(ConfigError, match=message):
    experiment.parse(config)


def test_what_parse_makes_is_what_the_config_says():
  config = experiment.default_config()
  again = experiment.parse(config)
  assert again == experiment.ExperimentConfig()
  assert parse(experiment.ExperimentConfig, dataclasses.asdict(again)) == again


def test_an_unknown_recipe_lists_the_known_ones():
  with pytest.raises(ConfigError, match=f"unknown recipe 'latnet'; known: {', '.join(sorted(recipes.RECIPES))}$"):
    recipes.apply(experiment.default_config(), "latnet")


def test_the_temperature_of_gumbel_falls_with_the_steps_and_changes_the_gradient_only():
  built = small("gumbel", **{"thought.temperature_end": 0.2, "thought.temperature_steps": 10})
  params, batch = built.init(jax.random.key(0)), first(built, 2)
  run = jax.jit(
    lambda step: jax.value_and_grad(lambda p: built.loss_fn(p, batch, jax.random.key(0), Carried(step=step))[0])(params)
  )
  (start, first_slope), (end, last_slope), (later, same_slope) = (run(jnp.int32(step)) for step in (0, 10, 99))
  assert start == end == later
  norm = lambda tree: float(sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(tree)))
  difference = lambda a, b: norm(jax.tree.map(jnp.subtract, a, b))
  assert difference(first_slope, last_slope) > 0.01 * norm(first_slope)
  assert difference(same_slope, last_slope) == 0
