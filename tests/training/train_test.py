"""The command: wrong command lines and configs are lines with an exit code, never a traceback, and touch nothing."""

import os
import subprocess
import sys

import pytest

from tests.training.harness import ROOT

CONFIG = "--config=configs/word_problem.py"


def run(*arguments):
  command = [sys.executable, "-m", "thinking_lm.train", *arguments]
  environment = dict(os.environ, JAX_PLATFORMS="cpu")
  return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
  "arguments, code, texts",
  [
    ([], 64, ["--workdir=DIR are needed"]),
    ([CONFIG, "--config.trian.steps=3"], 64, ["no such config key: 'trian'", '"train"']),
    ([CONFIG, "--config.train.steps=abc"], 64, ["--config.train.steps=abc"]),
    ([CONFIG, "--config.train.distributed=True"], 78, ["which the other processes are", "turn it off"]),
    (["--config=configs/missing.py"], 78, ["configs/missing.py", "No such file"]),
    (
      [CONFIG, "--config.train.stepz=3", "--config.optimizer.learning_rate=nan", "--config.train.batch_size=-1"],
      78,
      ["config.train.stepz; did you mean config.train.steps?", "learning_rate must be finite", "batch_size must be"],
    ),
  ],
)
def test_faults_are_lines_and_nothing_is_touched(tmp_path, arguments, code, texts):
  workdir = tmp_path / "run"
  ended = run(*arguments, *([f"--workdir={workdir}"] if arguments else []))
  assert ended.returncode == code, ended.stderr
  assert all(text in ended.stderr for text in texts)
  assert all(line.startswith("error: ") for line in ended.stderr.splitlines())
  assert not workdir.exists()


@pytest.mark.parametrize(
  "text, words",
  [
    ("x = (", "SyntaxError"),
    ("def get_config():\n  return 1 // 0", "ZeroDivisionError: integer division or modulo by zero (config.py, line 2)"),
    (
      "def get_config():\n  return int('a')",
      "ValueError: invalid literal for int() with base 10: 'a' (config.py, line 2)",
    ),
    ("def get_config():\n  return 3", "its get_config gives int"),
  ],
)
def test_a_config_file_that_fails_is_told_with_its_line(tmp_path, text, words):
  (tmp_path / "config.py").write_text(text)
  ended = run(f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run")
  assert ended.returncode == 78 and words in ended.stderr.replace(f"{tmp_path}/", ""), ended.stderr
  assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1


def test_a_config_file_that_is_not_there_is_one_line_with_other_options_too(tmp_path):
  ended = run("--config=missing.py", "--config.train.steps=4", f"--workdir={tmp_path}/run")
  assert ended.returncode == 78 and "missing.py" in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr


def test_what_was_mended_in_the_data_is_said_before_the_start(tmp_path):
  (tmp_path / "a").write_bytes(b"some text " * 20)
  (tmp_path / "b").touch()
  source = ["--config.data.source=text", f"--config.data.input={tmp_path}/*", "--config.data.on_empty=skip"]
  ended = run("--config=configs/text.py", *source, f"--workdir={tmp_path}/a")  # a file: it stops at the start
  assert ended.returncode == 73, ended.stderr
  assert "data: 1 empty skipped\n" in ended.stderr


def test_help_lists_the_config():
  ended = run("--help")
  assert "--config.train.max_skips=5: non-finite steps in a row" in ended.stdout
  assert "Exit codes" in ended.stdout and ended.returncode == 0
