"""A run that is killed and started again ends like one that was not, bit for bit."""

import json
import signal

import pytest

from tests.training import harness

PROGRAMS = dict(toy=harness.toy(steps=16, sleep=0.05))


@pytest.fixture(scope="module", params=PROGRAMS)
def program(request):
  return PROGRAMS[request.param]


@pytest.fixture(scope="module")
def gold(program, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("gold") / "run"
  ended = harness.run(program, workdir)
  assert ended.code == 0 and ended.errors == "", ended.errors
  return harness.outcome(workdir)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments(program, gold, tmp_path, seed):
  hits = harness.run_with_kills(program, tmp_path / "run", kills=5, seed=seed, most_lines=5)
  assert hits >= 3
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
