"""Work directories and data in an object store: the commands, on the fake one of `bucket.py`."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests import quick

ROOT = pathlib.Path(__file__).resolve().parents[1]
RUN = (
  "--config=configs/text.py:none",
  "--config.data.source=arrayrecord",
  "--config.data.input=gs://bucket/prepared",
  "--config.data.sequence_length=16",
  "--config.data.align=1",
  "--config.model.layers=1",
  "--config.model.width=16",
  "--config.train.batch_size=4",
  "--config.train.log_every=1",
  "--config.optimizer.schedule=constant",
  "--config.optimizer.warmup_steps=0",
  "--config.checkpoint.every=2",
  "--workdir=gs://bucket/run",
)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
  return tmp_path_factory.mktemp("store") / "bucket"


def run(bucket, module, *flags, code=0):
  """What a command prints, with the bucket's directory as gs://."""
  environment = quick.environment()
  environment["XDG_CACHE_HOME"] = environment["HOME"] = str(bucket.parent)  # copies of shards go there
  command = [sys.executable, "-m", "tests.bucket", str(bucket.parent), f"thinking_lm.{module}", *flags]
  ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
  assert ended.returncode == code, ended.stderr
  assert "Traceback" not in ended.stderr
  return ended.stdout + ended.stderr


def test_a_run_in_a_bucket(bucket):
  (bucket / "text").mkdir(parents=True)
  (bucket / "text" / "a.txt").write_text("some text, and more of it. " * 60)
  run(bucket, "prepare", "--input=gs://bucket/text/*.txt", "--output=gs://bucket/prepared")
  assert json.loads((bucket / "prepared" / "manifest.json").read_text())
  told = run(bucket, "train", *RUN, "--config.train.steps=5")
  assert "nothing keeps a second run out of it" in told and "starting at step 0 in gs://bucket/run" in told
  checkpoints = bucket / "run" / "checkpoints"
  assert sorted(path.name for path in checkpoints.iterdir()) == ["4", "5"]

  told = run(bucket, "train", *RUN, "--config.train.steps=6")
  assert "going on from step 5" in told
  rows = [json.loads(line) for line in (bucket / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]

  told = run(bucket, "evaluate", "--workdir=gs://bucket/run", "--limit=4", "--batch_size=4")
  assert "written: gs://bucket/run/evaluation/validation-6.json" in told
  assert json.loads((bucket / "run" / "evaluation" / "validation-6.json").read_text())["rows"] == 4

  damaged = next(path for path in (checkpoints / "6" / "arrays").rglob("d/*") if path.is_file())
  damaged.write_bytes(damaged.read_bytes() + b"x")
  told = run(bucket, "train", *RUN, "--config.train.steps=7")
  assert "CHECKPOINT 6 IS DAMAGED" in told and "going on from step 5" in told
  told = run(bucket, "train", *RUN, "--config.train.steps=7", "--config.model.width=32", code=78)
  assert "config.model.width: 16 there, 32 now" in told
  assert "already complete: 7 steps" in run(bucket, "train", *RUN, "--config.train.steps=7")
