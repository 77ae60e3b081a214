"""The quickstart at a size of seconds: its table, plot, sample and second call; and wrong command lines."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from thinking_lm import experiment, quickstart

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def tiny(monkeypatch):
  """Models and data of a few rows in place of those of the config files; nothing is asked of speed."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  load, text = quickstart.load_config, ROOT / "tests" / "quickstart_test.py"

  def shrink(part, recipe):
    values = load(part, recipe)
    values.model.update(layers=1, width=8, heads=2, kv_heads=1, mlp_width=8)
    values.train.update(batch_size=8, tensorboard=False)
    values.data.task.update(length=3, eval_examples=9)
    if part == "text":
      values.data.update(source="text", input=str(text), sequence_length=16)
    return values

  monkeypatch.setattr(quickstart, "load_config", shrink)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


def call(capsys, workdir, **options):
  """What the quickstart prints."""
  assert experiment, "libraries define flags when they are imported, and flagsaver removes those that it did not know"
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(["quickstart"])
  with flagsaver.flagsaver(workdir=str(workdir), steps=2, **options):
    quickstart.main(["quickstart"])
  return capsys.readouterr().out


def test_arms_table_plot_and_sample(tiny, tmp_path, capsys):
  out = call(capsys, tmp_path)
  heads = "arm seed {} parameters steps think/real FLOPs x none seconds"
  lines = out.splitlines()
  for part, measure in dict(text="bits_per_byte", word_problem="accuracy").items():
    at = lines.index(f"{part}, test split")
    assert lines[at + 1].split() == heads.format(measure).split()
    arms = [arm.name for arm in quickstart.PARTS[part]]
    for arm, line in zip(arms, lines[at + 2 :], strict=False):
      assert line.startswith(f"{arm} "), out
      row = json.loads((tmp_path / part / quickstart.slug(dict(arm=arm, seed=0)) / "result.json").read_text())
      assert f"{row['flops']:.2e}" in line and f"{row['think_per_real']:.3f}" in line and row["steps"] >= 2
  equal, thinker = (
    json.loads((tmp_path / "text" / name / "result.json").read_text()) for name in ("none-equal-FLOPs-0", "latent-0")
  )
  assert equal["flops"] == pytest.approx(thinker["flops"], rel=0.25)  # as near as whole steps come
  assert "nats per token lost with other thoughts in place: none " in out
  sample = out[out.index("The statement ") :].splitlines()[0]
  assert "⟨" in sample and "⟩" in sample
  assert f"plot: {tmp_path}/quickstart.png\n" in out and f"work directories: {tmp_path}\n" in out
  assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")

  results = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
  (tmp_path / "quickstart.png").unlink()
  again = call(capsys, tmp_path, parts=["word_problem"])  # reads what is there, and trains nothing again
  assert "starting at" not in again and (tmp_path / "quickstart.png").exists()
  assert results == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} and len(results) == 6
  table = out[out.index("word_problem, test split") : out.index("\n\nA sample")]
  assert table in again


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--parts=txt", "--parts takes each of text, word_problem once, got 'txt'"),
    ("--parts=", "--parts takes each of text, word_problem once, got ''"),
    ("--workdir=", "--workdir is empty"),
    ("--seeds=0", "flag --seeds=0: 0 is not a positive integer"),
    ("--steps=some", "flag --steps=some: invalid literal"),
    ("--stepz=3", "Unknown command line flag 'stepz'. Did you mean: steps"),
  ],
)
def test_a_wrong_command_line_is_one_line(tmp_path, flag, message):
  command = [sys.executable, "-m", "thinking_lm.quickstart", f"--workdir={tmp_path}/run", flag]
  environment = dict(os.environ, PYTHONPATH=str(ROOT))
  ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
  assert (ended.returncode, ended.stdout) == (64, "")
  assert ended.stderr.startswith(f"error: {message}") and ended.stderr.count("\n") == 1
  assert not list(tmp_path.iterdir())
