"""Every recipe that has a file is a legal config and says what it is."""

import ast
import json
import pathlib
import runpy

import jax
import pytest

from thinking_lm import experiment, recipes

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "configs/recipes").glob("*.py"))
STAGES = dict(fast_quiet_star=("0", "3"), coconut=("0", "1", "3"))
CASES = [(path, stage) for path in FILES for stage in STAGES.get(path.stem, (None,))]
SECTIONS = ("Command:", "Measured:", "arXiv:")


def shrunk(path, stage, tmp_path):
  """The config of a file with a model, rows and groups small enough for a test."""
  get_config = runpy.run_path(str(path))["get_config"]
  values = get_config() if stage is None else get_config(stage)
  values.model.update(layers=1, width=16, heads=2)
  values.train.update(steps=2, batch_size=8, log_every=1, tensorboard=False)
  values.optimizer.update(warmup_steps=0, schedule="constant")
  values.data.threads = 0
  if values.data.source == "default":
    values.data.sequence_length = 32
  if values.data.source == "verdicts":
    rows = [dict(prompt=f"{p}=", candidate=str(c), correct=p == c) for p in range(30) for c in range(2)]
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values.data.input = str(tmp_path / "v.jsonl")
  values.thought.samples = min(values.thought.samples, 2)
  values.thought.length = min(values.thought.length, max(3, 2 * values.thought.report))
  return values


@pytest.mark.parametrize(("path", "stage"), CASES, ids=lambda value: getattr(value, "stem", value))
def test_a_recipe_is_legal(path, stage, tmp_path):
  experiment.parse(shrunk(path, stage, tmp_path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_file_is_a_protocol(path):
  text = ast.get_docstring(ast.parse(path.read_text()))
  assert "arXiv:" in text and "Measured:" in text and "python -m thinking_lm.train" in text
  assert "Departs" in text or "Not a paper's" in text


def test_every_named_recipe_is_legal_on_a_start_and_keeps_to_known_options():
  for name in recipes.RECIPES:
    config = recipes.apply(recipes.start(experiment.default_config(), "text"), name)
    experiment.parse(config)
  assert jax.tree.leaves(recipes.STARTS)
