"""Starts training programs as real processes, kills them at lines of their output, and compares what they leave.

A program is a function workdir -> command line, so that the toy and `thinking_lm.train` with any config take the same
tests.
"""

import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import jax
from orbax.checkpoint import v1 as ocp

from thinking_lm.training import checkpoint as checkpoint_lib
from thinking_lm.training import state as state_lib
from thinking_lm.training.writers import read_rows

ROOT = pathlib.Path(__file__).resolve().parents[2]
Program = Callable[[pathlib.Path], list[str]]


def toy(steps: int, sleep: float = 0.0) -> Program:
  """The toy of `toy.py`."""
  flags = [f"--steps={steps}", f"--sleep={sleep}"]
  return lambda workdir: [sys.executable, "-m", "tests.training.toy", *flags, f"--workdir={workdir}"]


def experiment(config: str, *overrides: str) -> Program:
  """`thinking_lm.train` with a config `NAME:RECIPE`; it must log every step and save every few."""
  name, recipe = config.split(":")
  flags = [f"--config=configs/{name}.py:{recipe}", *overrides]
  return lambda workdir: [sys.executable, "-m", "thinking_lm.train", *flags, f"--workdir={workdir}"]


@dataclasses.dataclass
class Ended:
  """How a process ended: exit code (negative: the signal that killed it), lines of steps it printed, its stderr."""

  code: int
  lines: list[str]
  errors: str


def run(program: Program, workdir: pathlib.Path, at_line: int | None = None, number=signal.SIGKILL, delay=0.0) -> Ended:
  """Runs a program to its end. After `at_line` lines about steps (and `delay` seconds) it is sent a signal."""
  environment = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="", PYTHONUNBUFFERED="1")
  with (
    open(workdir.with_suffix(".stderr"), "w+", encoding="utf-8") as errors,
    subprocess.Popen(
      program(workdir), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
    ) as process,
  ):
    lines = []
    for line in process.stdout:
      if line.startswith("step "):
        lines.append(line)
        if len(lines) == at_line:
          time.sleep(delay)
          process.send_signal(number)
    code = process.wait()
    errors.seek(0)
    return Ended(code, lines, errors.read())


def run_with_kills(program: Program, workdir: pathlib.Path, kills: int, seed: int, most_lines: int) -> int:
  """Kills the program `kills` times, each after 1 to `most_lines` lines, then lets it end. Returns the kills that hit.

  `delay` moves the kill through the step: into the computation, a save, or the writing of a manifest.
  """
  random_ = random.Random(seed)
  hits = 0
  for _ in range(kills):
    ended = run(program, workdir, at_line=random_.randint(1, most_lines), delay=random_.uniform(0.0, 0.1))
    assert ended.code in (0, -signal.SIGKILL), ended.errors
    hits += ended.code != 0
  last = run(program, workdir)
  assert last.code == 0, last.errors
  return hits


def outcome(workdir: pathlib.Path) -> tuple[str, list[tuple[int, str]]]:
  """(SHA-256 over all leaves of the last state, the loss of every step as hexadecimal float)."""
  directory = checkpoint_lib.epath.Path(workdir / "checkpoints")
  step, _ = checkpoint_lib.survey(directory)
  schema = checkpoint_lib.verify(directory / str(step))["schema"]
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  leaves = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, (shape, dtype) in schema.items()}
  digest = state_lib.digest(ocp.load(directory / str(step) / checkpoint_lib.ARRAYS, leaves))
  rows = read_rows(workdir / "metrics.jsonl")
  return digest, [(row["step"], row["loss"].hex()) for row in rows if "loss" in row]
