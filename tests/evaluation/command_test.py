import functools
import json

import pytest

from tests import quick

command = functools.partial(quick.command, "evaluate")


def test_the_command_prints_a_table_and_writes_all_of_it(trained):
  workdir, _, _ = trained
  flags = [f"--workdir={workdir}", "--split=test", "--limit=5", "--controls=none", "--samples=1,2"]
  code, out, errors = command(*flags, "--batch_size=4", "--positions")
  assert code == 0, errors
  file = workdir / "evaluation" / "test-3.json"
  assert out.rstrip().endswith(f"written: {file}") and "test: 5 rows, 30 real tokens, 30 think tokens" in out
  for start in ("thoughts ", "own ", "none ", "K = 1 ", "K = 2 ", "accuracy at ", "top label", "softmax "):
    assert any(line.startswith(start) for line in out.split("\n")), start
  found = json.loads(file.read_text())
  assert (found["step"], found["rows"], found["limit"], found["averaged"]) == (3, 5, 5, False)
  assert found["command"].startswith("python -m thinking_lm.evaluate --workdir=") and found["code"]["source"]
  assert list(found["arms"]) == ["none", "own"] and list(found["draws"]) == ["1", "2"]  # names are sorted
  assert found["draws"]["1"]["nats_per_token"] == pytest.approx(found["arms"]["own"]["nats_per_token"], rel=1e-5)
  assert sorted(path.name for path in file.parent.iterdir()) == ["test-3-reliability.png", "test-3.json"]


def test_what_is_wrong_is_said_in_one_line(tmp_path):
  workdir = f"--workdir={tmp_path}"
  for flags, code, message in [
    ([], 64, "--workdir=DIR is needed"),
    ([workdir, "--split=dev"], 64, "unknown split 'dev'; known: train, validation, test"),
    ([workdir, "--controls=own,mvoed"], 64, "unknown control 'mvoed'; known: own, pause, shuffled, moved, none"),
    ([workdir, "--samples=1,x"], 64, "got 'x'"),
    ([workdir], 78, f"{tmp_path} is no work directory"),
  ]:
    found = command(*flags)
    assert found[0] == code and found[1] == "" and message in found[2], (flags, found)
    assert found[2].count("\n") == 1
  assert list(tmp_path.iterdir()) == []


def test_help_names_every_option_and_control():
  _, out, _ = command("--help")
  for name in ("workdir", "split", "batch_size", "limit", "controls", "samples", "averaged", "positions", "seed"):
    assert f"--{name}" in out or f"--[no]{name}" in out, name
  assert "shuffled" in out and "Exit codes" in out
