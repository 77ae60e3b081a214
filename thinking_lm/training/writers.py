"""Where numbers go: rows of `metrics.jsonl`, TensorBoard, and lines for people, with a bar on a terminal."""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import tensorboardX
import tqdm
from etils import epath

from thinking_lm.errors import DataError
from thinking_lm.metrics import Mean
from thinking_lm.training import storage

LEADING = ("loss", "bits_per_byte")
"""What a line begins with, where it is there; the other metrics follow by name."""

ROWS_ONLY = (
  "needed_flops_per_second",
  "moved_bytes_per_second",
  "flops_per_byte",
  "nats",
  "bytes",
  "real_tokens",
  "think_tokens",
  "param_norm",
  "update_norm",
  "skips_in_a_row",
)
"""Metrics that stand in the rows but not in the lines: what is shown derives from them, or they seldom matter."""


class Rows:
  """`metrics.jsonl`: one JSON object a line with `step`, `attempt` and numbers; null where one is not finite.

  A step has a row from the loop and one from each hook, with different names. A resumed run repeats steps, so rows
  after the restored step are cut off first: a reader sees each row once. An object store cannot append: there the file
  is written anew at every `flush`.
  """

  def __init__(self, path: epath.Path, step: int, attempt: int):
    self._path, self._attempt = path, attempt
    self._kept = [json.dumps(row) for row in read_rows(path) if row["step"] <= step]
    storage.write_atomic(path, "".join(f"{line}\n" for line in self._kept))
    self._file = path.open("a") if storage.is_local(path) else None

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Adds a row."""
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    line = json.dumps(dict(step=step, attempt=self._attempt, **finite), allow_nan=False)
    if self._file is None:
      self._kept.append(line)
    else:
      self._file.write(f"{line}\n")
      self._file.flush()

  def flush(self) -> None:
    """Makes sure that the rows outlive a crash: called before a checkpoint says that their steps are done."""
    if self._file is None:
      storage.write_atomic(self._path, "".join(f"{line}\n" for line in self._kept))
    else:
      os.fsync(self._file.fileno())

  def close(self) -> None:
    """Flushes and closes."""
    self.flush()
    if self._file is not None:
      self._file.close()


def read_rows(path) -> list[dict]:
  """The rows of a `metrics.jsonl`, none if there is no such file. A last line that a crash cut short is left out.

  Raises:
    DataError: a line is not a row.
  """
  path = epath.Path(path)
  rows = []
  for number, line in enumerate((path.read_text() if path.exists() else "").split("\n")[:-1], start=1):
    try:
      rows.append(json.loads(line))
      rows[-1]["step"]
    except (ValueError, TypeError, KeyError) as error:
      raise DataError(f"{path} line {number} is not a row of metrics: {line[:80]!r}") from error
  return rows


class TensorBoard:
  """TensorBoard events; those of repeated steps are hidden."""

  def __init__(self, path: epath.Path, step: int):
    self._writer = tensorboardX.SummaryWriter(os.fspath(path), purge_step=step + 1)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Adds one point to each curve."""
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def flush(self) -> None:
    """Hands the events to the file."""
    self._writer.flush()

  def close(self) -> None:
    """Flushes and closes."""
    self._writer.close()


class Clocks:
  """Seconds spent waiting for something, and what happened per second, since they were last read.

  Wall-clock time decides nothing: a run gives the same numbers however long it takes.
  """

  def __init__(self):
    self._start = time.monotonic()
    self._waits: dict[str, float] = {}
    self._counts: dict[str, float] = {}

  @contextmanager
  def wait(self, name: str) -> Iterator[None]:
    """Counts the time inside as waiting for `name`."""
    begin = time.monotonic()
    try:
      yield
    finally:
      self._waits[name] = self._waits.get(name, 0.0) + time.monotonic() - begin

  def count(self, name: str, number: float) -> None:
    """Adds to what is shown per second."""
    self._counts[name] = self._counts.get(name, 0.0) + number

  def read(self) -> dict[str, float]:
    """Name -> per second for what was counted, `wait_NAME` -> fraction of the time; starts anew."""
    seconds = max(time.monotonic() - self._start, 1e-9)
    values = {f"{name}_per_second": number / seconds for name, number in self._counts.items()}
    values.update({f"wait_{name}": wait / seconds for name, wait in self._waits.items()})
    self._start, self._counts = time.monotonic(), {}
    self._waits = dict.fromkeys(self._waits, 0.0)
    return values


class Work(NamedTuple):
  """What a training step costs, as `analysis.training` and `analysis.traffic` count it, and what the devices could do.

  needed: `Ledger.floor`, thinking included. plain: the floor of the same real tokens without thoughts. moved:
  `Traffic.total`, bytes of memory; 0 where it was not counted. peak: FLOP/s of all devices in bf16; 0 where it is not
  known, and then there is no MFU.
  """

  needed: float
  plain: float
  moved: float = 0.0
  peak: float = 0.0

  def rates(self, steps_per_second: float) -> dict[str, float]:
    """Per second, and shares of the peak.

    needed_flops_per_second, moved_bytes_per_second, their ratio flops_per_byte; mfu_thinking, and mfu_real for the real
    tokens alone.
    """
    found = dict(needed_flops_per_second=self.needed * steps_per_second)
    if self.moved:
      found["moved_bytes_per_second"] = self.moved * steps_per_second
      found["flops_per_byte"] = self.needed / self.moved
    if self.peak:
      found["mfu_thinking"] = self.needed * steps_per_second / self.peak
      found["mfu_real"] = self.plain * steps_per_second / self.peak
    return found


def derived(metrics: Mapping[str, Mean]) -> dict[str, float]:
  """The metrics as numbers, and bits per byte where `nats` and `bytes` are among them."""
  values = {name: float(mean) for name, mean in metrics.items()}
  if "nats" in metrics and "bytes" in metrics:
    values["bits_per_byte"] = float(metrics["nats"].total) / max(float(metrics["bytes"].total), 1.0) / math.log(2)
  return values


class Progress:
  """How the run goes: a line for each logged step, on a terminal with a bar below; nothing where `quiet`."""

  def __init__(self, start: int, steps: int, quiet: bool = False):
    stream = sys.stdout
    self._start, self._steps, self._stream, self._quiet = start, steps, stream, quiet
    self._begin = time.monotonic()
    self._bar = None
    if stream.isatty() and not quiet:
      # Some terminals say that they have no columns and no rows; tqdm would then show nothing.
      size = shutil.get_terminal_size()
      self._bar = tqdm.tqdm(total=steps, initial=start, file=stream, unit="step", ncols=size.columns, nrows=size.lines)

  def say(self, line: str) -> None:
    """A line of its own."""
    if self._bar is not None:
      self._bar.write(line, file=self._stream)
    elif not self._quiet:
      print(line, file=self._stream, flush=True)

  def advance(self, step: int) -> None:
    """`step` steps are finished."""
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

  def show(self, step: int, values: Mapping[str, float]) -> None:
    """The numbers of a logged step."""
    first = [name for name in LEADING if name in values]
    names = first + [name for name in values if name not in (*first, *ROWS_ONLY)]
    texts = [f"{name} {_number(name, values[name])}" for name in names]
    if self._bar is not None:
      self._bar.set_postfix_str(" ".join(texts[: len(first)]), refresh=False)
    left = (time.monotonic() - self._begin) / max(step - self._start, 1) * (self._steps - step)
    self.say(" ".join([f"step {step}/{self._steps}", *texts, f"eta {_duration(left)}"]))

  def close(self) -> None:
    """Leaves the terminal on a fresh line."""
    if self._bar is not None:
      self._bar.close()


def _number(name: str, value: float) -> str:
  return f"{value:.1%}" if name.startswith("wait_") else f"{value:.4g}"


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
