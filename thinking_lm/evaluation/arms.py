"""The runs of a comparison: each arm trained with several seeds and evaluated, by the commands a user would type."""

import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from thinking_lm.errors import ThinkingLMError


class Comparison(NamedTuple):
  """config: file of all arms. root: where their work directories go. seeds: runs of each. split: what is evaluated."""

  config: str
  root: str
  seeds: int
  split: str


def commands(comparison: Comparison, arm: str, seed: int) -> tuple[pathlib.Path, list[list[str]]]:
  """(The work directory of an arm's run, the arguments of what trains and evaluates it).

  Args:
    arm: a recipe of the config file, options `name=value`, or both, joined by commas; `{seed}` stands for the seed.
  """
  parts = arm.replace("{seed}", str(seed)).split(",")
  recipe = "" if "=" in parts[0] else f":{parts.pop(0)}"
  path = pathlib.Path(comparison.root) / f"{re.sub(r'[^-A-Za-z0-9_.=]+', '_', arm)}-{seed}"
  options = [f"--config.{part}" for part in [*parts, f"train.seed={seed}", f"data.seed={seed}"]]
  train = ["thinking_lm.train", f"--config={comparison.config}{recipe}", f"--workdir={path}", *options]
  given = [f"--split={comparison.split}", "--generate=false"]
  return path, [train, ["thinking_lm.evaluate", f"--workdir={path}", *given]]


def runs(comparison: Comparison, arms: Sequence[str]) -> Iterator[str]:
  """Work directories of all arms and seeds, each trained and evaluated; what has been evaluated is not run again."""
  jobs = [(arm, seed) for arm in arms for seed in range(comparison.seeds)]
  for number, (arm, seed) in enumerate(jobs, start=1):
    path, made = commands(comparison, arm, seed)
    if not list(path.glob(f"evaluation/{comparison.split}-*.json")):
      print(f"[{number}/{len(jobs)}] {arm}, seed {seed}", flush=True)
      for command in made:
        call(command)
    yield str(path)


def call(command: Sequence[str]) -> None:
  """Runs a command of ours; what it prints goes on to stderr. Raises ThinkingLMError with its exit code."""
  code = subprocess.run([sys.executable, "-m", *command], stdout=sys.stderr, check=False).returncode
  if code:
    error = ThinkingLMError(f"{shlex.join(['python', '-m', *command])} ended with exit code {code}")
    error.exit_code = code if code > 0 else 128 - code
    raise error
