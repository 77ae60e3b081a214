"""PonderNet's claims on the real model: configs/parity.py as it stands, one seed of each price."""

import functools
import pathlib
import runpy

import jax
import pytest

from tests.evaluation.harness import KEY
from thinking_lm import experiment
from thinking_lm.evaluation.evaluators import evaluate
from thinking_lm.evaluation.summary import summarise
from thinking_lm.training import loop

CONFIG = pathlib.Path(__file__).resolve().parents[2] / "configs/parity.py"


@functools.cache
def trained(folder, recipe="latent", **objective):
  """The summary of a run's evaluation on 512 rows of the test split."""
  values = runpy.run_path(str(CONFIG))["get_config"](recipe)
  values.data.task.eval_examples = 512
  values.train.tensorboard = False
  values.health.every = 0
  values.objective.update(objective)
  built = experiment.build(experiment.parse(values))
  params = jax.device_get(loop.train(built.run(), str(folder / f"{recipe}{objective}")).params)
  controls = ("none",) if values.thought.length else ()
  found = evaluate(built, params, "test", key=KEY, batch_size=64, controls=controls, samples=())
  return summarise(found, tagging=True, task=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("parity")


def think(values) -> float:
  """Think tokens a target."""
  return values["think_tokens"] / values["arms"][values["reference"]]["targets"]


@pytest.mark.slow
def test_steps_used_correlate_with_difficulty(folder):
  values = trained(folder)
  assert values["arms"]["own"]["accuracy"][0] > 0.95 and values["difficulty"]["correlation"][1] > 0.2
  assert 0.5 < think(values) < 3


@pytest.mark.slow
def test_no_price_uses_the_cap_and_a_high_one_leaves_the_plain_decoder(folder):
  assert think(trained(folder, price=0.0)) > 0.85 * 4
  dear, plain = trained(folder, price=1.0), trained(folder, "none")
  nats = lambda values, name: values["arms"][name]["nats_per_token"][0]
  assert think(dear) == 0 and nats(dear, "own") == pytest.approx(nats(dear, "none"), abs=1e-6)
  assert nats(dear, "own") == pytest.approx(nats(plain, "none"), abs=0.1)
