"""The frontier of a few made-up runs, and what is said of a directory that is none."""

import json

import pytest

from thinking_lm.errors import ConfigError, DataError
from thinking_lm.evaluation import frontier


def write(path, think, nats, step=3, split="test", price=0.0):
  thought = dict(placement="every", topology="private", kind="latent", length=2, halting="ponder")
  arm = dict(targets=10.0, nats_per_token=[nats, nats - 0.1, nats + 0.1], accuracy=None)
  (path / "evaluation").mkdir(parents=True, exist_ok=True)
  (path / "config.json").write_text(json.dumps(dict(objective=dict(price=price))))
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
