"""Measures speed and memory against the plain step and the FLOP floor.

  python -m thinking_lm.bench --suite=plain [--case=TEXT] [--rounds=5] [--output=FILE] [--against=FILE] [--profile=DIR]

Suites: plain (the step without thoughts, and backends of attention), private and persistent (steps that think),
quiet_star (private thoughts as Quiet-STaR computes them), decode and halting (sampling, and what stopping saves), data,
checkpoint, chip (compiled for one TPU chip, where libtpu is installed; nothing runs), accelerator (plain and thinking
steps in bfloat16 on the first device there is, with their MFU).

Variants of a case take turns in one process that is restricted to one compute thread; times are CPU seconds on a CPU
and wall seconds on an accelerator. Prints a table for each case: median seconds, ratio within a round to the first
variant (the plain step, where the suite has one), ratio to the floor (1 is as many FLOP/s as the first variant
reaches, on the FLOPs that the work needs; nan where it needs none), tokens a second, bytes between memory and chip by
the ledger, temporary bytes and compile time (CPU seconds) by XLA; then the bars that the case is held to. Everything is
written as JSON.

--against names such a file of earlier code; configs/bench has one of each suite but chip and accelerator. Then it also
prints what has become of every variant since, and which are slower, over the first one, beyond the spread of the
rounds, or need more memory. Of the first one itself it prints the seconds of both: those of two runs are not judged.

Exit codes: 0 measured (also when a bar is missed), 64 wrong command line, 73 the result or trace cannot be written.
"""

import datetime
import json
import os
import pathlib
import shlex
import sys

from absl import flags

from thinking_lm import errors
from thinking_lm.errors import UsageError, WorkdirError

_SUITE = flags.DEFINE_string("suite", None, "What to measure: one of the suites above.")
_CASE = flags.DEFINE_string("case", "", "Only the cases whose name contains this.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of every case.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "The JSON file; default runs/bench/SUITE.json.")
_AGAINST = flags.DEFINE_string("against", None, "The JSON file of an earlier run, to compare with.")
_PROFILE = flags.DEFINE_string("profile", None, "A directory for a JAX profiler trace of one more round.")

ENVIRONMENT = dict(
  NPROC="1",
  OMP_NUM_THREADS="1",
  MALLOC_MMAP_THRESHOLD_=str(2**33),
  MALLOC_TRIM_THRESHOLD_=str(2**34),
  MALLOC_TOP_PAD_=str(2**28),
)
"""One compute thread, and memory that is kept between calls: page faults would be a fifth of a plain step."""


def _restrict() -> None:
  """Starts this process again with ENVIRONMENT, which must be there before any library is loaded."""
  wanted = dict(os.environ, **ENVIRONMENT)
  wanted.pop("JAX_COMPILATION_CACHE_DIR", None)  # compile times are measured
  single = "--xla_cpu_multi_thread_eigen=false"
  if single not in wanted.get("XLA_FLAGS", ""):
    wanted["XLA_FLAGS"] = f"{wanted.get('XLA_FLAGS', '')} {single}".strip()
  if wanted != os.environ:
    os.execve(sys.executable, [sys.executable, "-m", "thinking_lm.bench", *sys.argv[1:]], wanted)


def _say(line: str) -> None:
  print(f"bench: {line}", file=sys.stderr, flush=True)


def main(argv) -> None:
  """Measures, prints and writes."""
  del argv
  from thinking_lm.analysis import bench
  from thinking_lm.analysis.bench_suites import SUITES
  from thinking_lm.training import storage, workdir

  if _SUITE.value not in SUITES:
    raise UsageError(f"--suite is one of {', '.join(SUITES)}; got {_SUITE.value or 'none'}")
  cases = [case for case in SUITES[_SUITE.value]() if _CASE.value in case.name]
  if not cases:
    known = ", ".join(case.name for case in SUITES[_SUITE.value]())
    raise UsageError(f"no case of suite {_SUITE.value} contains {_CASE.value!r}; there are {known}")
  before = _earlier(_AGAINST.value, _SUITE.value) if _AGAINST.value else {}
  path = pathlib.Path(_OUTPUT.value or f"runs/bench/{_SUITE.value}.json")
  storage.check_writable(path)
  if _PROFILE.value and "://" not in _PROFILE.value:
    storage.check_writable(pathlib.Path(_PROFILE.value, ".trace"))
  record = dict(
    suite=_SUITE.value,
    command=shlex.join(["python", "-m", "thinking_lm.bench", *sys.argv[1:]]),
    code=workdir.code_version(),
    hardware=bench.hardware(),
    load=os.getloadavg(),
    written=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    cases={},
  )
  for case in cases:
    results = bench.measure(case, _ROUNDS.value, _say, _PROFILE.value)
    print(bench.table(case, results), flush=True)
    record["cases"][case.name] = now = bench.record(case, results)
    if case.name in before:
      print(bench.against(before[case.name], now), flush=True)
    _write(path, record)  # after every case, so that a cut run leaves what it has
  print(f"written: {path}" + (f", a trace in {_PROFILE.value}" if _PROFILE.value else ""))


def _earlier(path: str, suite: str) -> dict:
  """The cases of an earlier record of the suite; says what it was measured on."""
  from thinking_lm.analysis import bench

  try:
    before = json.loads(pathlib.Path(path).read_text())
    found, commit, cases = before["suite"], before["code"]["commit"], before["cases"]
    where = f"{', '.join(before['hardware']['cpu'])}, {before['hardware']['device']}"
    for case in cases.values():
      bench.against(case, case)
  except OSError as error:
    raise UsageError(f"--against {path} cannot be read: {error.strerror}") from error
  except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
    raise UsageError(f"--against {path} is not what this command writes ({type(error).__name__}: {error})") from error
  if found != suite:
    raise UsageError(f"--against {path} is of suite {found}, not {suite}")
  _say(f"against {commit and commit[:7]} on {where}")
  return cases


def _write(path, record) -> None:
  from thinking_lm.training import storage

  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(path, storage.canonical(record, indent=2) + "\n")
  except OSError as error:
    raise WorkdirError(f"cannot write {path}: {error}") from error


if __name__ == "__main__":
  __doc__ = __doc__.replace("%", "%%")  # What absl prints for --help.
  _restrict()
  errors.run(main)
