"""Every recipe that has a file is a legal config, says what it is, and trains."""

import ast
import json
import pathlib
import runpy

import jax
import numpy as np
import pytest

from thinking_lm import experiment, recipes
from thinking_lm.training import loop
from thinking_lm.training.mesh import MeshConfig, global_batch, make_mesh
from thinking_lm.training.state import key as random_key

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "configs/recipes").glob("*.py"))
STAGES = dict(fast_quiet_star=("0", "3"), coconut=("0", "1", "3"))
CASES = [(path, stage) for path in FILES for stage in STAGES.get(path.stem, (None,))]


@pytest.mark.parametrize(("path", "stage"), CASES, ids=lambda value: getattr(value, "stem", value))
def test_a_recipe_is_legal(path, stage):
  get_config = runpy.run_path(str(path))["get_config"]
  values = get_config() if stage is None else get_config(stage)
  if values.data.source == "verdicts":
    values.data.input = "some.jsonl"  # what the user brings
  experiment.parse(values)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_file_is_a_protocol(path):
  text = ast.get_docstring(ast.parse(path.read_text()))
  assert "arXiv:" in text and "Measured:" in text and "python -m thinking_lm.train" in text
  assert "Departs" in text or "Not a paper's" in text


def test_every_named_recipe_is_legal_on_a_start_and_keeps_to_known_options():
  for name in recipes.RECIPES:
    config = recipes.apply(recipes.start(experiment.default_config(), "text"), name)
    experiment.parse(config)


OWN = dict(
  verifier=("solver", "discriminative", "written", "thinking"),
  placement=("every", "stride", "entropy", "proxy", "router"),
)
"""Recipes that only one config file knows."""


@pytest.mark.parametrize("name", OWN)
def test_a_config_files_own_recipes_are_legal(name):
  for recipe in OWN[name]:
    values = runpy.run_path(str(ROOT / f"configs/{name}.py"))["get_config"](recipe)
    if values.data.source == "verdicts":
      values.data.input = "some.jsonl"
    config = experiment.parse(values)
    assert config.thought.length or recipe in ("solver", "discriminative", "written"), recipe


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  """(a small corpus, verdicts): what the recipes read here."""
  folder = tmp_path_factory.mktemp("texts")
  corpus, verdicts = folder / "corpus.txt", folder / "verdicts.jsonl"
  corpus.write_text("The cat sat. It was a hat! Who knows?\n" * 40)
  lines = [dict(prompt=f"{i}+1=", candidate=str(i + j), correct=j == 1) for i in range(40) for j in range(3)]
  verdicts.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return corpus, verdicts


def shrunk(path, stage, texts):
  """The config of a recipe file on two short rows and one narrow layer, its thoughts as short as they can be."""
  get_config = runpy.run_path(str(path))["get_config"]
  values = get_config() if stage is None else get_config(stage)
  values.model.update(dict(layers=1, width=8, heads=2))
  values.train.update(dict(batch_size=2, steps=2))
  values.optimizer.warmup_steps = 0
  values.evaluation.every = values.health.every = 0
  if values.data.source == "default":
    values.data.update(dict(source="text", input=str(texts[0]), sequence_length=16))
  elif values.data.source == "verdicts":
    values.data.input = str(texts[1])
  if values.thought.length:
    free = values.thought.length - 2 * values.thought.report
    values.thought.length = 2 * values.thought.report + min(free, 2)
    values.thought.samples = min(values.thought.samples, 2)
    values.thought.need_above = 0.0
    values.thought.room = values.thought.room and 2
  return experiment.parse(values)


TRAINED = [(path, dict(fast_quiet_star="3", coconut="1").get(path.stem)) for path in FILES]
"""Stages whose programs are not those of another recipe."""


@pytest.mark.parametrize(("path", "stage"), TRAINED, ids=lambda value: getattr(value, "stem", value))
def test_a_recipe_trains(path, stage, texts):
  """Two steps of the real train step, on one device. Compiling is all the cost: the first state is not compiled too."""
  built = experiment.build(shrunk(path, stage, texts))
  mesh = make_mesh(MeshConfig(data=1, fsdp=1), devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    made, key = loop.program(built.run(mesh), mesh), random_key(0, "train")
    state, random = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), made.state), np.random.default_rng(0)
    before = jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32), state.params)
    state = jax.device_put(state.replace(params=before), made.shardings)
    batches = built.data.batches("train", global_batch=2)
    first, second = (global_batch(mesh, next(batches)) for _ in range(2))
    step = made.step.lower(state, first, key).compile()
    state, metrics = step(state, first, key)
    state, metrics = step(state, second, key)
  said = {name: float(mean.total / max(float(mean.count), 1e-30)) for name, mean in jax.device_get(metrics).items()}
  assert int(state.step) == 2 and said["skipped"] == 0 and np.isfinite(list(said.values())).all()
  moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, jax.device_get(state.params))
  flat = path.stem == "rpt"  # a model that knows nothing never says the next byte: nothing is paid
  assert flat == (said["grad_norm"] == 0) and moved["embedding"]
  assert flat or all(jax.tree.leaves(moved["layers"]))
  assert ("reward" in said) == bool(built.config.objective.score_weight)
  assert bool(built.config.thought.length) == ("think_length" in said)
