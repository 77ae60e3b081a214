"""The quickstart at a size of seconds: its table, plot, sample and second call; and wrong command lines."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests import quick

ROOT = pathlib.Path(__file__).resolve().parents[1]
ARMS = dict(text=("none", "none, equal FLOPs", "latent"), word_problem=("none", "pause", "latent"))


def run(module, cwd, *arguments):
  """A command in a process of its own; nothing is asked of speed."""
  environment = quick.environment()
  environment["PYTHONPATH"] = str(ROOT)
  command = [sys.executable, "-m", module, *arguments]
  return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def call(workdir, *flags):
  """What the quickstart prints, at the size of `tiny_quickstart`."""
  ended = run("tests.tiny_quickstart", ROOT, f"--workdir={workdir}", "--steps=2", *flags)
  assert ended.returncode == 0, ended.stderr
  return ended.stdout


def test_arms_table_plot_and_sample(tmp_path):
  out = call(tmp_path)
  heads = "arm seed {} parameters steps think/real FLOPs x none bytes seconds"
  lines = out.splitlines()
  for part, measure in dict(text="bits_per_byte", word_problem="accuracy").items():
    at = lines.index(f"{part}, test split")
    assert lines[at + 1].split() == heads.format(measure).split()
    for arm, line in zip(ARMS[part], lines[at + 2 :], strict=False):
      assert line.startswith(f"{arm} "), out
      directory = f"{arm}-0".replace(", ", "-").replace(" ", "-")
      row = json.loads((tmp_path / part / directory / "result.json").read_text())
      assert (
        f"{row['flops']:.2e}" in line
        and f"{row['moved']:.2e}" in line
        and f"{row['think_per_real']:.3f}" in line
        and row["steps"] >= 2
      )
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
  again = call(tmp_path, "--parts=word_problem")  # reads what is there, and trains nothing again
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
  ended = run("thinking_lm.quickstart", tmp_path, f"--workdir={tmp_path}/run", flag)
  assert (ended.returncode, ended.stdout) == (64, "")
  assert ended.stderr.startswith(f"error: {message}") and ended.stderr.count("\n") == 1
  assert not list(tmp_path.iterdir())
