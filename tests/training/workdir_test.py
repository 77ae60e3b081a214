import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from etils import epath

from thinking_lm.errors import ConfigError, WorkdirError
from thinking_lm.training import storage, workdir

CONFIG = dict(train=dict(steps=10, seed=0), model=dict(width=8, sizes=(1, 2)), checkpoint=dict(every=5))


def test_a_relative_directory_becomes_absolute(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", "/home/me")
  assert workdir.resolve("runs/a b ü") == epath.Path(tmp_path / "runs" / "a b ü")
  assert os.fspath(workdir.resolve("~/runs")) == "/home/me/runs"
  assert os.fspath(workdir.resolve("gs://bucket/runs")) == "gs://bucket/runs"


@pytest.mark.parametrize("where", ["file", "below_a_file", "no_such_place", "read_only", "name_too_long"])
def test_a_directory_that_cannot_be_written_is_one_line(tmp_path, where):
  (tmp_path / "file").write_text("")
  paths = dict(
    file=tmp_path / "file",
    below_a_file=tmp_path / "file" / "run",
    no_such_place=pathlib.Path("/proc/no/run"),
    read_only=pathlib.Path("/proc/self"),
    name_too_long=tmp_path / ("x" * 300),
  )
  with pytest.raises(WorkdirError) as error, workdir.hold(epath.Path(paths[where])):
    pass
  assert error.value.exit_code == 73
  assert str(paths[where]) in str(error.value) and "--workdir" in str(error.value) and "\n" not in str(error.value)


def test_holding_leaves_no_probe(tmp_path):
  with workdir.hold(epath.Path(tmp_path / "new" / "run")):
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["lock"]


def test_a_second_run_is_kept_out_and_told_by_whom(tmp_path):
  hold = "import sys\nfrom etils import epath\nfrom thinking_lm.training import workdir\n"
  hold += "with workdir.hold(epath.Path(sys.argv[1])):\n  print('held', flush=True)\n  sys.stdin.read()\n"
  command = [sys.executable, "-c", hold, str(tmp_path)]
  with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
    assert holder.stdout.readline() == "held\n"
    message = f"in use by process {holder.pid} on .*, started "
    with pytest.raises(WorkdirError, match=message), workdir.hold(epath.Path(tmp_path)):
      pass
    holder.kill()
  with workdir.hold(epath.Path(tmp_path)):  # a killed run holds nothing
    pass


def test_the_config_is_written_and_agrees_with_itself(tmp_path):
  for _ in range(2):
    workdir.agree_config(epath.Path(tmp_path), CONFIG)
  assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(CONFIG))


def test_a_run_that_saved_nothing_gives_way(tmp_path):
  workdir.agree_config(epath.Path(tmp_path), CONFIG)
  other = dict(CONFIG, model=dict(width=16))
  workdir.agree_config(epath.Path(tmp_path), other)
  assert json.loads((tmp_path / "config.json").read_text())["model"] == dict(width=16)


def test_another_config_is_refused_with_the_keys_that_differ(tmp_path):
  workdir.agree_config(epath.Path(tmp_path), CONFIG)
  (tmp_path / "checkpoints" / "5").mkdir(parents=True)
  before = (tmp_path / "config.json").read_bytes()
  other = dict(CONFIG, train=dict(steps=20, seed=1), model=dict(width=8, sizes=(1, 3), depth=2))
  with pytest.raises(ConfigError) as error:
    workdir.agree_config(epath.Path(tmp_path), other)
  assert error.value.exit_code == 78
  assert error.value.faults[1:-1] == [
    "  config.model.depth: nothing there, 2 now",
    "  config.model.sizes: [1, 2] there, [1, 3] now",
    "  config.train.seed: 0 there, 1 now",
  ]
  assert (tmp_path / "config.json").read_bytes() == before


def test_length_cadence_and_mesh_may_change(tmp_path):
  workdir.agree_config(epath.Path(tmp_path), CONFIG)
  other = dict(CONFIG, train=dict(steps=20, seed=0), checkpoint=dict(every=1), mesh=dict(data=2))
  workdir.agree_config(epath.Path(tmp_path), other)
  assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 20


def test_status_counts_attempts(tmp_path):
  for attempt in (1, 2):
    status = workdir.Status(epath.Path(tmp_path))
    status.write("running", None)
    status.write("failed", 3, "why")
    record = json.loads((tmp_path / "status.json").read_text())
    assert (record["state"], record["step"], record["reason"], record["attempt"]) == ("failed", 3, "why", attempt)


def test_versions_name_code_libraries_and_device(tmp_path):
  code = workdir.write_versions(epath.Path(tmp_path), jax.devices())
  record = json.loads((tmp_path / "versions.json").read_text())
  assert record["code"] == code and len(code["source"]) == 64
  assert record["libraries"]["jax"] == jax.__version__
  assert record["devices"] == dict(kind="cpu", platform="cpu", count=8)


def test_an_atomic_write_keeps_the_old_file_until_the_new_one_is_whole(tmp_path, monkeypatch):
  path = epath.Path(tmp_path / "file")
  storage.write_atomic(path, "old")

  def die(path):
    raise OSError("the disk went away")

  monkeypatch.setattr(storage, "fsync", die)
  with pytest.raises(OSError):
    storage.write_atomic(path, "new")
  assert path.read_text() == "old"
