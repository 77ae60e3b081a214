"""Bernoulli contexts on the real model: configs/bernoulli.py as it stands, one seed of each score."""

import pathlib
import runpy

import jax
import pytest

from tests.evaluation.harness import KEY
from thinking_lm import experiment
from thinking_lm.evaluation import calibration
from thinking_lm.evaluation.evaluators import evaluate
from thinking_lm.training import loop

CONFIG = pathlib.Path(__file__).resolve().parents[2] / "configs/bernoulli.py"


def ece(path, scoring: str) -> float:
  """Of the report of a run that a scoring rule paid, on the test split."""
  values = runpy.run_path(str(CONFIG))["get_config"]()
  values.train.tensorboard = False
  values.objective.scoring = scoring
  built = experiment.build(experiment.parse(values))
  params = jax.device_get(loop.train(built.run(), str(path)).params)
  found = evaluate(built, params, "test", key=KEY, batch_size=64, controls=(), samples=())
  return calibration.summarise(found.calibration)["forecasters"]["report"]["ece"][0]


@pytest.mark.slow
def test_reports_become_true_under_a_proper_score_and_not_under_an_accuracy(tmp_path):
  proper, accuracy = ece(tmp_path / "proper", "brier"), ece(tmp_path / "accuracy", "zero_one")
  assert proper < 0.03 and accuracy > 0.1, (proper, accuracy)
