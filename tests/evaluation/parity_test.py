"""PonderNet's claims on the real model: the command of configs/parity.py, one seed of each price."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
ARMS = ("objective.price=0", "objective.price=0.005", "objective.price=1")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  """arm -> what `evaluate` wrote of its run. XLA compiles as it does by default: these runs are long."""
  root = tmp_path_factory.mktemp("parity")
  line = [sys.executable, "-m", "thinking_lm.frontier", "--config=configs/parity.py", f"--root={root}", "--seeds=1"]
  environment = dict(os.environ, JAX_PLATFORMS="cpu", NPROC="1", XLA_FLAGS="")
  subprocess.run([*line, *ARMS], cwd=ROOT, env=environment, check=True)
  return {arm: json.loads((root / f"{arm}-0/evaluation/test-1500.json").read_text()) for arm in ARMS}


def think(values) -> float:
  """Think tokens a target."""
  return values["think_tokens"] / values["arms"]["own"]["targets"]


@pytest.mark.slow
def test_steps_used_correlate_with_difficulty(found):
  values = found["objective.price=0.005"]
  assert values["arms"]["own"]["accuracy"][0] > 0.95 and values["difficulty"]["correlation"][1] > 0.2
  assert 0.5 < think(values) < 3


@pytest.mark.slow
def test_no_price_uses_the_cap_and_a_high_one_is_the_plain_decoder(found):
  assert think(found["objective.price=0"]) > 0.85 * 4
  dear = found["objective.price=1"]
  nats = lambda values, name: values["arms"][name]["nats_per_token"][0]
  assert think(dear) == 0 and nats(dear, "own") == pytest.approx(nats(dear, "none"), abs=1e-6)
  # Another decoder, trained without thoughts from the start, is another run: BUILD_NOTES.md has how far apart they are.
