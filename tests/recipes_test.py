"""Every recipe that has a file is a legal config and says what it is."""

import ast
import pathlib
import runpy

import pytest

from thinking_lm import experiment, recipes

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
