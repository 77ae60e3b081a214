"""The work directory of a run: made, tried and locked before anything is computed, and what stands in it.

What there is: `config.json` (the resolved config), `versions.json` (code and libraries), `status.json` (running,
finished, preempted or failed, and why), `metrics.jsonl` (rows for the logged steps), `tensorboard/`, `checkpoints/`
(see `checkpoint`), and `lock`, which is held while a run is alive.
"""

import contextlib
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from thinking_lm.data import sources
from thinking_lm.errors import ConfigError, WorkdirError
from thinking_lm.training import storage

FREE_KEYS = (
  "train.steps",
  "optimizer.schedule_steps",
  "train.log_every",
  "train.tensorboard",
  "train.accumulation",
  "train.distributed",
  "data.input",
  "data.validation_input",
  "data.test_input",
  "data.tokenizer",
  "data.memory_limit_mb",
  "data.verify",
  "data.threads",
  "data.prefetch",
  "data.workers",
  "checkpoint.",
  "evaluation.",
  "mesh.",
  "model.attention",
)
"""Config keys, or whole sections, that may change when a run is continued: they do not change what is computed, apart
from how long, and from rounding when the devices, the micro-batches or the backend of attention differ.
(`optimizer.changed_rates` sees to it that more steps change no rate of a finished one.) Where the data lies may change,
what it says may not: every checkpoint holds the data's digest."""

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ml-collections", "etils")


def resolve(path: str) -> epath.Path:
  """The absolute path of a work directory, as of `sources.absolute`."""
  return epath.Path(sources.absolute(os.fspath(path)))


@contextlib.contextmanager
def hold(path: epath.Path) -> Iterator[None]:
  """Creates the directory, tries to write into it, and keeps every other run out until the context ends.

  The lock belongs to the open file: it goes when the process does, however it dies.

  Raises:
    WorkdirError: it cannot be created or written, or another run, which is named, holds it.
  """
  probe = path / f".probe-{os.getpid()}"
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe.write_text("probe")
    probe.unlink()
  except OSError as error:
    raise WorkdirError(f"cannot write the work directory {path}: {error}; choose another --workdir") from error
  if not storage.is_local(path):
    logging.warning("%s is on an object store: nothing keeps a second run out of it", path)
    yield
    return
  with open(path / "lock", "a+", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise WorkdirError(f"the work directory {path} is in use by {file.read().strip() or 'another run'}") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, started {_now()}")
    file.flush()
    yield


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested sections -> dotted key -> value."""
  flat = {}
  for key, value in config.items():
    flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
  return flat


def config_there(path: epath.Path) -> dict[str, Any] | None:
  """The nested config of the run that the directory belongs to; None if there is none, or none that saved a step."""
  file = path / "config.json"
  there = file.exists() and any((path / "checkpoints").glob("*"))
  return json.loads(file.read_text()) if there else None


def agree_config(path: epath.Path, config: Mapping[str, Any]) -> None:
  """Writes `config.json`, unless the directory belongs to a run with another config.

  A run that never saved a step has nothing to lose: its config may be replaced.

  Raises:
    ConfigError: one line for every key that differs and is not among `FREE_KEYS`.
  """
  config = json.loads(storage.canonical(config))  # Tuples become lists, as they are in the file.
  there = config_there(path)
  if there is not None:
    old, new = flatten(there), flatten(config)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key, ...) != new.get(key, ...)]
    lines = {key: f"config.{key}: {_show(old, key)} there, {_show(new, key)} now" for key in changed}
    faults = [f"  {line}" for key, line in lines.items() if not key.startswith(FREE_KEYS)]
    if faults:
      title = f"the work directory {path} belongs to a run with another config:"
      raise ConfigError([title, *faults, "go on with that config, or choose another --workdir"])
    for line in lines.values():
      logging.warning("the config of %s changes, %s", path, line)
  storage.write_atomic(path / "config.json", storage.canonical(config, indent=2) + "\n")


def agree_command(step: int, data: str, **more: Any) -> None:
  """`agree_processes` on an evaluation: its command line, the checkpoint found, the data's digest, and `more`.

  Raises ConfigError as that does.
  """
  agree_processes({"the command line": shlex.join(sys.argv[1:]), "the checkpoint": step, "the data": data, **more})


def agree_processes(values: Mapping[str, Any]) -> None:
  """Does nothing if all processes of the job have the same flat `values`; process 0 is right.

  Raises:
    ConfigError: on every process, one line for every key in which a process differs.
  """
  if jax.process_count() == 1:
    return
  names = sorted(values)
  number = lambda value: np.uint32(int(storage.sha256(storage.canonical(value))[:8], 16))
  if len(np.unique(multihost_utils.process_allgather(number(names)))) > 1:
    raise ConfigError("the processes of this job run different versions of the code: their configs have other keys")
  faults = []
  numbers_PX = multihost_utils.process_allgather(np.array([number(values[name]) for name in names]))
  for name, number_P in zip(names, numbers_PX.T, strict=True):
    others = [str(process) for process in np.flatnonzero(number_P != number_P[0])]
    if others:
      here = f"here, on process {jax.process_index()}, it is {storage.canonical(values[name])}"
      faults.append(
        f"{name} differs between process 0 and {', '.join(others)}: {here}; start all with the same command"
      )
  if faults:
    raise ConfigError(faults)


def _show(values: Mapping[str, Any], key: str) -> str:
  return json.dumps(values[key]) if key in values else "nothing"


def code_version() -> dict[str, str | None]:
  """What ran: a digest of the package's source files, and the git commit where the package lies in a repository."""
  root = pathlib.Path(__file__).parents[1]
  total = hashlib.sha256()
  for file in sorted(root.rglob("*.py")):
    total.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
  git = ["git", "-C", os.fspath(root), "rev-parse", "HEAD"]
  try:
    commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    commit = None
  return dict(source=total.hexdigest(), commit=commit)


def write_versions(path: epath.Path, devices: list) -> dict[str, Any]:
  """Writes `versions.json` and returns the code version."""
  code = code_version()
  found = {name: importlib.metadata.version(name) for name in LIBRARIES}
  device = dict(kind=devices[0].device_kind, platform=devices[0].platform, count=len(devices))
  record = dict(code=code, libraries=found, python=platform.python_version(), devices=device)
  storage.write_atomic(path / "versions.json", storage.canonical(record, indent=2) + "\n")
  return code


class Status:
  """`status.json`: how the run stands, for people and launchers. Written whole, at starts, commits and ends."""

  def __init__(self, path: epath.Path):
    self._file = path / "status.json"
    self.before = json.loads(self._file.read_text()) if self._file.exists() else {}
    self.attempt = self.before.get("attempt", 0) + 1
    self._started = _now()

  def write(self, state: str, step: int | None, reason: str = "") -> None:
    """Records the state (running, finished, preempted, failed), the last committed step, and why."""
    record = dict(state=state, step=step, reason=reason, attempt=self.attempt, started=self._started, written=_now())
    record.update(pid=os.getpid(), host=socket.gethostname())
    storage.write_atomic(self._file, storage.canonical(record, indent=2) + "\n")
