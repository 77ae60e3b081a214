"""The frontier of a few made-up runs, and what is said of a directory that is none."""

import json

import numpy as np
import pytest

from thinking_lm.errors import ConfigError, DataError, ThinkingLMError
from thinking_lm.evaluation import arms as arms_lib
from thinking_lm.evaluation import frontier


def write(path, think, nats, step=3, split="test", price=0.0, seed=0, proxy="", accuracy=None):
  thought = dict(placement="every", topology="private", kind="latent", length=2, halting="ponder", proxy=proxy)
  arm = dict(targets=10.0, nats_per_token=[nats, nats - 0.1, nats + 0.1], accuracy=accuracy)
  (path / "evaluation").mkdir(parents=True, exist_ok=True)
  config = dict(objective=dict(price=price), train=dict(seed=seed, steps=step), thought=dict(proxy=proxy))
  (path / "config.json").write_text(json.dumps(config))
  values = dict(reference="own", think_tokens=think, thought=thought, arms=dict(own=arm))
  (path / "evaluation" / f"{split}-{step}.json").write_text(json.dumps(values))
  return str(path)


def test_a_star_where_no_other_run_is_as_cheap_and_better(tmp_path):
  cases = [("a", 0, 2.0), ("b", 20, 1.0), ("c", 15, 1.5), ("d", 15, 1.6), ("e", 30, 1.0), ("f", 5, 2.5)]
  runs = [write(tmp_path / name, think, nats, price=0.5 * (name == "c")) for name, think, nats in cases]
  points = [point for run in runs for point in frontier.read(run, "test")]
  assert [point.run for point, star in zip(points, frontier.best(points), strict=True) if star] == ["a", "b", "c"]
  lines = frontier.table(points).split("\n")
  assert [line.replace("*", " ").split()[0] for line in lines[1:]] == ["a", "f", "c", "d", "b", "e"]
  assert "1.500" in lines[3] and "price 0.5" in lines[3] and lines[3].startswith("*") and lines[4].startswith(" ")


def test_the_latest_step_of_the_split_counts(tmp_path):
  write(tmp_path, 1, 9.0, step=20, split="validation")
  write(tmp_path, 2, 8.0, step=9)
  run = write(tmp_path, 3, 7.0, step=10)
  write(tmp_path, 4, 7.0, step="10-length=1")
  assert [point.think for point in frontier.read(run, "test")] == [0.4, 0.3]
  assert frontier.read(run, "test")[0].run == tmp_path.name + "-length=1"
  assert [point.nats[0] for point in frontier.read(run, "validation")] == [9.0]


def test_what_is_not_there_or_damaged_is_told(tmp_path):
  with pytest.raises(ConfigError, match="has no evaluation of 'test'"):
    frontier.read(str(tmp_path), "test")
  run = write(tmp_path, 1, 1.0)
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(DataError, match="is not what `evaluate` leaves"):
    frontier.read(run, "test")


def test_runs_that_differ_in_their_seeds_are_one_arm(tmp_path):
  cases = [
    (0, 0.0, "", 1.0),
    (1, 0.0, "", 2.0),
    (2, 0.0, "", 6.0),
    (0, 0.5, "", 0.5),
    (0, 0.0, "a", 9.0),
    (1, 0.0, "b", 7.0),
  ]
  runs = [
    write(tmp_path / str(i), 10 + seed, nats, price=price, seed=seed, proxy=proxy, accuracy=[nats / 10, None, None])
    for i, (seed, price, proxy, nats) in enumerate(cases)
  ]
  found = frontier.arms([point for run in runs for point in frontier.read(run, "test")])
  assert [(arm.runs, arm.nats.value, arm.think.value) for arm in found] == [
    (1, 0.5, 1.0),
    (2, 8.0, pytest.approx(1.05)),
    (3, 3.0, pytest.approx(1.1)),
  ]
  half = 4.303 * np.std([1, 2, 6], ddof=1) / np.sqrt(3)
  assert found[2].nats.low == pytest.approx(3 - half) and found[0].nats.low is None
  assert found[2].accuracy.high == pytest.approx((3 + half) / 10)
  lines = frontier.arms_table(found).split("\n")
  assert [line[0] for line in lines[1:]] == ["*", " ", " "] and "proxy" in lines[2] and "price 0.5" in lines[1]
  assert frontier.picture(found)[:4] == b"\x89PNG"


def test_a_run_without_a_loss_leaves_its_arm_without_one(tmp_path):
  runs = [write(tmp_path / "a", 1, 1.0, seed=0), write(tmp_path / "b", 1, 2.0, seed=1)]
  points = [point for run in runs for point in frontier.read(run, "test")]
  (arm,) = frontier.arms([points[0], points[1]._replace(nats=[None, None, None])])
  assert arm.runs == 2 and arm.nats.value is None and arm.accuracy is None and frontier.best([arm]) == [False]


def test_arms_become_commands_and_what_is_evaluated_is_not_run_again(tmp_path, monkeypatch):
  comparison, called = arms_lib.Comparison("configs/x.py", str(tmp_path), 2, "test"), []
  monkeypatch.setattr(arms_lib, "call", called.append)
  arms = ["latent,thought.proxy=/r/none-{seed}", "objective.price=0.1"]
  write(tmp_path / "objective.price=0.1-0", 1, 1.0)
  assert [run.removeprefix(f"{tmp_path}/") for run in arms_lib.runs(comparison, arms)] == [
    *(f"latent_thought.proxy=_r_none-_seed_-{seed}" for seed in (0, 1)),
    *(f"objective.price=0.1-{seed}" for seed in (0, 1)),
  ]
  trained = [line for line in called if line[0] == "thinking_lm.train"]
  assert len(trained) == 3 and len(called) == 6
  assert trained[1][1] == "--config=configs/x.py:latent" and trained[1][3:] == [
    "--config.thought.proxy=/r/none-1",
    "--config.train.seed=1",
    "--config.data.seed=1",
  ]
  assert not any("controls" in option for line in called for option in line)  # not every arm has thoughts of its own
  assert trained[2][1] == "--config=configs/x.py" and trained[2][3] == "--config.objective.price=0.1"


def test_a_command_that_fails_ends_with_its_code():
  with pytest.raises(ThinkingLMError, match=r"python -m thinking_lm\.nothing ended with exit code 1") as caught:
    arms_lib.call(["thinking_lm.nothing"])
  assert caught.value.exit_code == 1
