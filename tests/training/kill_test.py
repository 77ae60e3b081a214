"""A run that is killed and started again ends like one that was not, bit for bit."""

import functools
import json
import pathlib
import signal
import tempfile

import pytest

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
  "--config.health.entropy_high=0",  # so small a model starts with sure thoughts, and alarms are told on stderr
)
PROGRAMS = dict(
  toy=harness.toy(steps=16, sleep=0.05),
  backprop=harness.experiment("word_problem:latent", *TINY),
  sampled=harness.experiment("word_problem:hybrid", *TINY, "--config.optimizer.ema=0.9"),
)
KILLS = 5


@functools.cache
def undisturbed(name):
  with tempfile.TemporaryDirectory() as directory:
    workdir = pathlib.Path(directory) / "run"
    ended = harness.run(PROGRAMS[name], workdir)
    assert ended.code == 0 and ended.errors == "", ended.errors
    return harness.outcome(workdir)


@pytest.mark.parametrize("name,seed", [("backprop", 0), ("sampled", 1)])
def test_killed_at_random_moments(tmp_path, name, seed):
  hits = harness.run_with_kills(PROGRAMS[name], tmp_path / "run", KILLS, seed, most_lines=12)
  assert hits >= KILLS // 2
  assert harness.outcome(tmp_path / "run") == undisturbed(name)
  assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("name", ["toy", "sampled"])
def test_terminated_and_started_again(tmp_path, name):
  program, workdir = PROGRAMS[name], tmp_path / "run"
  ended = harness.run(program, workdir, at_line=4, number=signal.SIGTERM)
  assert ended.code == 75
  assert "SIGTERM: stopped after step" in ended.errors and "Traceback" not in ended.errors
  record = json.loads((workdir / "status.json").read_text())
  assert record["state"] == "preempted" and record["step"] >= 4
  ended = harness.run(program, workdir)
  assert ended.code == 0 and f"step {record['step'] + 1}/" in ended.lines[0]
  assert harness.outcome(workdir) == undisturbed(name)
