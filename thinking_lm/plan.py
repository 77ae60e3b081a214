"""Compiles a run for a TPU pod on this machine's CPU, and says whether it fits and what it would wait for.

  python -m thinking_lm.plan --config=configs/pod/NAME.py[:RECIPE] --topology=v5e:16x16 [--slices=N] [--fit]
  python -m thinking_lm.plan --budgets=configs/pod/budgets.json        what `make plan` does

The real training step, sampler and evaluation rollout are compiled, with the run's own shardings; no data is read and
no parameter allocated. Memory is the compiler's own figure, and so are the collectives; FLOPs are the ledger's; seconds
are a roofline with its assumptions written beneath. With --budgets, a part is compiled only if what the compiler would
be given (program, devices, versions, options) is not what its budget was written for; --again compiles all. Needs
libtpu (`make plan` sees to it), or for h100: and h200:HOSTSxGPUS jax-cuda13-plugin; no accelerator.

What is printed: of each part the bytes of one device, by what they are, at the XLA optimisation level that it was
compiled at (O1, and what does not fit there once more at the run's own), and collectives by kind: how often in the
program, how often they run in a step, the bytes of a device in these. Then, whatever the parts, the training step's
FLOPs on all devices: base (the real tokens), think (think tokens), readout (heads), draw (making think tokens), beside
(other passes), backward, their total, and the floor: each product once forward and twice backward; and the bytes
between memory and chip of one device.

Exit codes: 0 fits (or all budgets hold), 1 does not, 64 wrong command line or damaged budget file, 73 a file cannot be
written, 78 wrong config or topology.
"""

import concurrent.futures
import json
import multiprocessing
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from thinking_lm import config, errors

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file; --config.key=value changes a key of it.",
  lock_config=False,
  accept_new_attributes=True,
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "The pod, NAME:AxB[xC]: v5e:16x16, v5p:8x8x8, v6e:16x16, ..., or h100:HOSTSxGPUS, h200:..."
)
_SLICES = flags.DEFINE_integer("slices", 1, "Slices of that shape, joined by the data-centre network.", lower_bound=1)
_PARTS = flags.DEFINE_list(
  "parts", ["train", "generate", "evaluate"], "What is compiled; of an entry of --budgets, too."
)
_FIT = flags.DEFINE_bool(
  "fit", False, "For parts that do not fit, look for remat, micro-batches, mesh or rows that do."
)
_ROWS = flags.DEFINE_integer("rows", 0, "generate: prompts; 0: one for each device that splits rows.", lower_bound=0)
_PROMPT = flags.DEFINE_integer("prompt", 128, "generate: tokens of a prompt.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 128, "generate: tokens that are drawn.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Also write everything to this file.")
_BUDGETS = flags.DEFINE_string("budgets", None, "Compile every pod of this file and hold it to its budget.")
_ONLY = flags.DEFINE_string("only", "", "With --budgets: only the entries whose name contains this.")
_JOBS = flags.DEFINE_integer(
  "jobs", 2, "With --budgets: entries that are compiled at a time, of 3 GB each.", lower_bound=1
)
_WRITE = flags.DEFINE_bool("write", False, "With --budgets: write the figures that were found into the file instead.")
_AGAIN = flags.DEFINE_bool(
  "again", False, "With --budgets: compile what has not changed since its budget was written, too."
)

OF_ONE_POD = ("config", "topology", "slices", "fit", "json")
OF_BUDGETS = ("only", "jobs", "write", "again")
"""Options that say nothing with --budgets, and without."""


def main(argv) -> None:
  """One pod, or all of a budget file."""
  del argv
  from thinking_lm.analysis import budgets, chips, fitting, pods
  from thinking_lm.training import storage

  wrong = set(_PARTS.value) - set(pods.PARTS)
  if wrong or not _PARTS.value:
    raise errors.UsageError(f"unknown part {min(wrong, default='')!r}; known: {', '.join(pods.PARTS)}")
  idle = OF_ONE_POD if _BUDGETS.value else OF_BUDGETS
  if idle := [name for name in idle if flags.FLAGS[name].present]:
    raise errors.UsageError(f"--{idle[0]} {'does not go with' if _BUDGETS.value else 'needs'} --budgets; see --help")
  decode = pods.Decode(_ROWS.value, _PROMPT.value, _TOKENS.value)
  if _BUDGETS.value:
    sys.exit(_check(pathlib.Path(_BUDGETS.value), decode))
  if not flags.FLAGS["config"].present or not _TOPOLOGY.value:
    raise errors.UsageError("--config=configs/pod/NAME.py and --topology=v5e:16x16 are needed; see --help")
  if _JSON.value:
    storage.check_writable(pathlib.Path(_JSON.value))
  values = config.of_flag(_CONFIG)
  chip, devices, groups = chips.pod(_TOPOLOGY.value, _SLICES.value)
  plan = pods.plan(_sketch(values), chip, devices, groups, _PARTS.value, decode)
  print(pods.show(plan, f"{_TOPOLOGY.value} x {_SLICES.value}"))
  if _JSON.value:
    storage.write_atomic(pathlib.Path(_JSON.value), json.dumps(budgets.record(plan), indent=2) + "\n")
  if all(part.fits for part in plan.parts.values()):
    return
  print(f"does not fit: {fitting.advice(plan, _FIT.value, _sketch, devices, decode)}", file=sys.stderr)
  sys.exit(1)


def _sketch(values):
  """The Experiment of a config, or of an ExperimentConfig, without its data."""
  from thinking_lm import experiment

  return experiment.sketch(values if isinstance(values, experiment.ExperimentConfig) else experiment.parse(values))


def _check(path: pathlib.Path, decode) -> int:
  """Compiles the pods of a budget file. Returns the exit code."""
  from thinking_lm.analysis import budgets
  from thinking_lm.data.pipeline import end_with_parent
  from thinking_lm.training import storage

  entries = _entries(path)
  if _WRITE.value:
    storage.check_writable(path)
  asked = set(_PARTS.value)
  chosen = {name: entry for name, entry in entries.items() if _ONLY.value in name and asked & set(entry["parts"])}
  if not chosen:
    raise errors.UsageError(
      f"no entry of {path} contains {_ONLY.value!r} and has {' or '.join(_PARTS.value)}; there are {', '.join(entries)}"
    )
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(_JOBS.value, spawn, end_with_parent, initargs=(0, _JOBS.value)) as pool:
    submit = lambda name, entry: pool.submit(_compiled, path.parent, name, entry, _PARTS.value, decode, _AGAIN.value)
    records = {name: submit(name, entry) for name, entry in chosen.items()}
    broken = 0
    for name, record in records.items():
      try:
        found, entry = record.result(), entries[name]
      except errors.ConfigError as error:
        pool.shutdown(wait=False, cancel_futures=True)
        raise errors.ConfigError([f"{name}: {line}" for line in error.faults]) from error
      lines = [] if _WRITE.value else budgets.faults(entry.get("budget", {}), found)
      broken += bool(lines)
      print(f"{name}: {'; '.join(lines) or budgets.brief(found)}", flush=True)
      if _WRITE.value and all(part["fits"] for part in found["parts"].values()):
        entry["budget"] = entry.get("budget", {}) | budgets.budget(found)
        storage.write_atomic(path, json.dumps(entries, indent=2) + "\n")
  return int(broken > 0)


def _entries(path: pathlib.Path) -> dict:
  """The entries of a budget file. Raises UsageError."""
  from thinking_lm.analysis import budgets, pods

  try:
    entries = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise errors.UsageError(f"--budgets {path} cannot be read: {error}") from error
  if not isinstance(entries, dict) or not entries:
    raise errors.UsageError(f"--budgets {path} is no object with an entry for each pod")
  if missing := {f"{name.partition(':')[0]}.py" for name in entries} - {file.name for file in path.parent.iterdir()}:
    raise errors.UsageError(f"--budgets {path} names {min(missing)}, which is not beside it in {path.parent}")
  if faults := [line for name, entry in entries.items() for line in budgets.entry_faults(name, entry, pods.PARTS)]:
    raise errors.UsageError("\n".join(f"--budgets {path}: {line}" for line in faults))
  return entries


def _compiled(directory: pathlib.Path, name: str, entry: dict, parts: list[str], decode, again: bool) -> dict:
  """The record of those parts of an entry that are asked for; in a process of its own, which knows no flags."""
  import runpy

  from thinking_lm.analysis import budgets, chips, pods

  file, _, recipe = name.partition(":")
  try:
    values = runpy.run_path(str(directory / f"{file}.py"))["get_config"](recipe)
  except errors.ThinkingLMError:
    raise
  except Exception as error:  # as of a file that --config names
    raise errors.ConfigError(f"{directory / file}.py: {type(error).__name__}: {error}") from error
  chip, devices, groups = chips.pod(entry["topology"], entry.get("slices", 1))
  parts = [part for part in entry["parts"] if part in parts]
  known = budgets.known(entry, again)
  return budgets.record(pods.plan(_sketch(values), chip, devices, groups, parts, decode, known))


if __name__ == "__main__":
  __doc__ = __doc__.replace("%", "%%")  # What absl prints for --help.
  errors.run(main)
