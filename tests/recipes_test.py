"""Every recipe that has a file is a legal config, says what it is, and trains."""

import ast
import dataclasses
import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from thinking_lm import experiment, recipes
from thinking_lm.objectives.objective import objective
from thinking_lm.objectives.rewards import prefix_match
from thinking_lm.thoughts import topology
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
  reading=("sentence", "stride", "entropy", "proxy", "router"),
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
    values.thought.samples = 64 if values.thought.answer else min(values.thought.samples, 2)  # some answer is right
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
  assert said["grad_norm"] > 0 and moved["embedding"] and all(jax.tree.leaves(moved["layers"]))
  assert ("reward" in said) == bool(built.config.objective.score_weight)
  assert bool(built.config.thought.length) == ("think_length" in said)


@pytest.mark.slow
def test_a_stage_of_fast_quiet_star_starts_where_the_one_before_ended(texts, tmp_path, caplog):
  """From thoughts to none, whose mixing head is left out. A rate of next to nothing shows where a run started."""
  path, ended = ROOT / "configs/recipes/fast_quiet_star.py", {}
  for stage, rate, start in (("2", 2e-3, ""), ("3", 1e-9, str(tmp_path / "2"))):
    config = shrunk(path, stage, texts)
    built = experiment.build(config).with_sections(
      train=dataclasses.replace(config.train, batch_size=8, init_from=start, tensorboard=False),
      optimizer=dataclasses.replace(config.optimizer, learning_rate=rate),
    )
    ended[stage] = jax.device_get(loop.train(built.run(), str(tmp_path / stage)).params)
    first = jax.device_get(jax.jit(built.init)(random_key(config.train.seed, "init")))
    assert np.abs(ended[stage]["embedding"] - first["embedding"]).max() > 1e-3, "trained, or started elsewhere"
  assert "there only, and left out: heads/mix" in caplog.text and ended["2"].pop("heads")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), ended["3"], ended["2"])


def test_rpt_makes_right_answers_likelier_and_learns_nothing_where_none_is(texts):
  """At random parameters 1 answer in 257 is right, so that 64 of a group are paid differently here and there."""
  built = experiment.build(shrunk(ROOT / "configs/recipes/rpt.py", None, texts))
  batch, random = next(built.data.batches("train", global_batch=2)), np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32), built.model.shapes)

  def loss(params, batch):
    layout = built.place(params, batch)
    trace = built.rollout(params, batch, random_key(0, "train"), layout=layout)
    p_BN = topology.take(jnp.exp(trace.logp_BGT).mean(axis=1), layout.anchors_BN, 0.0)
    return objective(built.config.objective, trace)[0], (prefix_match(trace), p_BN)

  look = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (_, (reward_BGN, p_BN)), grads = look(params, batch)
  some_BN = (reward_BGN.max(axis=1) > 0) & (reward_BGN.min(axis=1) == 0)
  assert some_BN.any() and not some_BN.all(), "groups with a right answer and without one"
  size = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(grads)))
  assert size > 0
  _, after_BN = look(jax.tree.map(lambda leaf, grad: leaf - 1e-2 / size * grad, params, grads), batch)[0][1]
  assert (after_BN > p_BN)[some_BN].all()
  (_, (reward_BGN, _)), grads = look(params, batch.replace(weights_BT=np.zeros_like(batch.weights_BT)))
  assert not reward_BGN.any() and not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
