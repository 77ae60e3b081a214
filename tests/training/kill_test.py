"""A run that is killed and started again ends like one that was not, bit for bit."""

import json
import signal

import pytest

from tests.slow import leaving
from tests.training import harness

TINY = (
  "--config.train.steps=40",
  "--config.train.batch_size=8",
  "--config.train.log_every=1",
  "--config.train.tensorboard=False",
  "--config.checkpoint.every=3",
  "--config.optimizer.warmup_steps=5",
  "--config.data.task.length=6",
  "--config.model.width=16",
  "--config.health.every=0",
  "--config.health.entropy_high=0",  # so small a model starts with sure thoughts, and alarms are told on stderr
)
PROGRAMS = dict(
  toy=(harness.toy(steps=16, sleep=0.05), (5, 5), 5),
  backprop=(harness.experiment("word_problem:latent", *TINY), (2, 8), 12),
  sampled=(harness.experiment("word_problem:hybrid", *TINY, "--config.optimizer.ema=0.9"), (2, 8), 12),
)
"""name -> (program, kills of either seed, most lines of output before a kill)."""


@pytest.fixture(scope="module", params=leaving(PROGRAMS, ["toy", "sampled"]))
def name(request):
  return request.param


@pytest.fixture(scope="module")
def program(name):
  return PROGRAMS[name][0]


@pytest.fixture(scope="module")
def gold(program, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("gold") / "run"
  ended = harness.run(program, workdir)
  assert ended.code == 0 and ended.errors == "", ended.errors
  return harness.outcome(workdir)


@pytest.mark.parametrize("seed", leaving([0, 1], [1]))
def test_killed_at_random_moments(name, program, gold, tmp_path, seed):
  _, kills, most_lines = PROGRAMS[name]
  hits = harness.run_with_kills(program, tmp_path / "run", kills[seed], seed, most_lines)
  assert hits >= kills[seed] // 2
  assert harness.outcome(tmp_path / "run") == gold
  assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"


def test_terminated_and_started_again(program, gold, tmp_path):
  workdir = tmp_path / "run"
  ended = harness.run(program, workdir, at_line=4, number=signal.SIGTERM)
  assert ended.code == 75
  assert "SIGTERM: stopped after step" in ended.errors and "Traceback" not in ended.errors
  record = json.loads((workdir / "status.json").read_text())
  assert record["state"] == "preempted" and record["step"] >= 4
  ended = harness.run(program, workdir)
  assert ended.code == 0 and f"step {record['step'] + 1}/" in ended.lines[0]
  assert harness.outcome(workdir) == gold
