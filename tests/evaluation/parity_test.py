"""PonderNet's claims on the real model: the command of configs/parity.py, one seed of each price."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PRICES = ("0", "0.005", "1")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  """price -> what `evaluate` wrote of its run. XLA compiles as it does by default: these runs are long."""
  root = tmp_path_factory.mktemp("parity")
  line = [sys.executable, "-m", "thinking_lm.frontier", "--config=configs/parity.py", f"--root={root}", "--seeds=1"]
  environment = dict(os.environ, JAX_PLATFORMS="cpu", NPROC="1", XLA_FLAGS="")
  subprocess.run([*line, *(f"objective.price={p}" for p in PRICES)], cwd=ROOT, env=environment, check=True)
  return {p: json.loads((root / f"objective.price={p}-0/evaluation/test-1500.json").read_text()) for p in PRICES}


def think(values) -> float:
  """Think tokens a target."""
  return values["think_tokens"] / values["arms"]["own"]["targets"]


@pytest.mark.slow
def test_steps_used_correlate_with_difficulty(found):
  values = found["0.005"]
  assert values["arms"]["own"]["accuracy"][0] > 0.85 and values["difficulty"]["correlation"][1] > 0.1
  assert 0.5 < think(values) < 3


@pytest.mark.slow
def test_no_price_uses_the_cap_and_a_high_one_is_the_plain_decoder(found):
  assert think(found["0"]) > 0.85 * 4
  own, none = (found["1"]["arms"][name]["nats_per_token"][0] for name in ("own", "none"))
  assert think(found["1"]) == 0 and own == pytest.approx(none, abs=1e-6)
