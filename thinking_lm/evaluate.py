"""Evaluates a trained model: with its thoughts, without, and with others in their place, on the same tokens.

  python -m thinking_lm.evaluate --workdir=DIR [--split=validation] [--controls=own,none] [--samples=1,8,32]

Prints a table and writes everything, intervals included, to DIR/evaluation/SPLIT-STEP.json; results on other data than
the run's (--data) go to files of their own. The same command gives the same numbers again. Accuracy is by teacher
forcing: the real tokens before each target are given.

Thoughts, one line of the table each:
  own       the model's own, drawn once
  none      none: the same parameters without think tokens
  pause     the PAUSE embedding in place of every think token
  shuffled  another sequence's: of the nearest earlier row that thinks at the same anchor number
  moved     another position's: of the anchor before, in the same row

--thought changes where, how and how long the same parameters think: placements compare at equal numbers of thoughts
(`thinking_lm.frontier` prints them side by side), and any thought can be ended early by its entropy.

`minus own` is what replacing the model's own thoughts costs, in nats per token, on the targets that count under both.
Thoughts that are drawn also get log-mean-exp over K draws.

Calibration, of the first line's thoughts: how likely the most likely token is held to be against how often it comes,
as the softmax says it and, where thoughts report a distribution, as the report says it, on the same targets; ECE, Brier
score and its pieces; how far what is said is from what is done; and a reliability diagram beside the JSON file.

Of thoughts that may end early, on a task whose examples or labels differ in difficulty (parity, word_problem): think
tokens used and accuracy by it, and the rank correlation of think tokens with it. The residual of parallel iterations is
printed here, their gradient's gap by `thinking_lm.microscope`.

Exit codes: 0 done, 64 wrong command line, 65 damaged data or checkpoints, 73 the result cannot be written, 78 wrong
config.
"""

import dataclasses
import datetime
import functools
import shlex
import sys
from typing import Any

from absl import flags

from thinking_lm import errors
from thinking_lm.errors import ConfigError, UsageError, WorkdirError

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a trained run; gs:// paths also work.")
_SPLIT = flags.DEFINE_string("split", "validation", "validation, test or train.")
_BATCH = flags.DEFINE_integer(
  "batch_size", 32, "Rows at once, rounded up to what the devices divide; changes memory and speed only.", lower_bound=1
)
_LIMIT = flags.DEFINE_integer("limit", 0, "Evaluate the first rows only; 0: all.", lower_bound=0)
_CONTROLS = flags.DEFINE_list("controls", None, "Lines of the table; default: all that say something about the model.")
_SAMPLES = flags.DEFINE_list("samples", ["1", "8", "32"], "The K of log-mean-exp, for thoughts that are drawn.")
_AVERAGED = flags.DEFINE_bool("averaged", False, "The moving average of the parameters (runs with optimizer.ema).")
_POSITIONS = flags.DEFINE_bool("positions", False, "Also print accuracy by position, for tasks that label every token.")
_GENERATE = flags.DEFINE_bool("generate", True, "Also score greedily generated answers, for tasks that ask for text.")
_PLACES = dict(
  input=flags.DEFINE_string("data", "", "Where the run's data.input lies now; may also be other data."),
  validation_input=flags.DEFINE_string("validation_data", "", "The same for data.validation_input."),
  test_input=flags.DEFINE_string("test_data", "", "The same for data.test_input."),
  tokenizer=flags.DEFINE_string("tokenizer", "", "Where the run's tokenizer lies now, as in data.tokenizer."),
)
_THOUGHT = flags.DEFINE_list(
  "thought", [], "Options of the thought section for this evaluation, such as placement=entropy,need_above=1.5,room=32."
)
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Started on every host: join the others with jax.distributed.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the thoughts that are drawn.", lower_bound=0, upper_bound=2**32 - 1)


def _samples() -> tuple[int, ...]:
  wrong = [text for text in _SAMPLES.value if not (text.isascii() and text.isdecimal() and int(text))]
  if wrong:
    raise UsageError(f"--samples takes whole numbers from 1 up, such as 1,8,32; got {wrong[0]!r}")
  return tuple(map(int, _SAMPLES.value))


def _check() -> tuple[int, ...]:
  """The samples, when the command line names only what there is. Raises UsageError."""
  from thinking_lm.data.sources import SPLITS
  from thinking_lm.evaluation.controls import CONTROLS, NONE

  if not _WORKDIR.value:
    raise UsageError("--workdir=DIR is needed; see --help")
  known = (*CONTROLS, NONE)
  if _SPLIT.value not in SPLITS:
    raise UsageError(f"unknown split {_SPLIT.value!r}; known: {', '.join(SPLITS)}")
  for name in _CONTROLS.value or ():
    if name not in known:
      raise UsageError(f"unknown control {name!r}; known: {', '.join(known)}")
  return _samples()


def main(argv) -> None:
  """Loads, evaluates, prints and writes."""
  del argv
  samples = _check()
  import jax

  from thinking_lm import experiment
  from thinking_lm.evaluation import continuations, evaluators, summary
  from thinking_lm.evaluation.progress import Progress
  from thinking_lm.training import mesh as mesh_lib
  from thinking_lm.training import state, workdir

  if _DISTRIBUTED.value:
    mesh_lib.join("--distributed")
  subject, params, step = experiment.load(
    _WORKDIR.value, _AVERAGED.value, places={name: flag.value for name, flag in _PLACES.items()}
  )
  workdir.agree_command(step, subject.data.digest)
  subject = subject.rethought(_THOUGHT.value)
  if not subject.data.rows(_SPLIT.value):
    full = [name for name in subject.data.splits if subject.data.rows(name)]
    raise ConfigError(f"this run's data has no {_SPLIT.value} rows; there are {', '.join(full)}")
  mesh, leads = mesh_lib.everywhere(), jax.process_index() == 0
  size = -(-_BATCH.value // mesh.size) * mesh.size
  task = subject.data.task
  tagging = task is not None and task.tagging
  answer = functools.partial(continuations.answers, subject, params, key=state.key(_SEED.value, "generate"))
  found = evaluators.evaluate(
    subject,
    params,
    _SPLIT.value,
    key=state.key(_SEED.value, "evaluate"),
    batch_size=size,
    limit=_LIMIT.value or None,
    controls=_CONTROLS.value or None,
    samples=samples,
    put=lambda batch: mesh_lib.global_batch(mesh, batch),
    answer=answer if task is not None and not tagging and _GENERATE.value else None,
    progress=Progress() if leads else lambda done, total: None,
  )
  if not leads:
    return
  values = summary.summarise(found, tagging=tagging, task=task is not None)
  path = workdir.resolve(_WORKDIR.value)
  print(_title(path, step, subject.config.thought, values))
  print(summary.table(values, positions=_POSITIONS.value))
  print(f"\nintervals: {summary.INTERVALS}")
  name = _name(path, step, subject.data.digest)
  print(_draw(path, name, step, values["calibration"]))
  print(f"written: {_write(path, name, step, subject, values)}")


def _title(path, step: int, thought, values: dict[str, Any]) -> str:
  what = f"{thought.length} x {thought.kind}, {thought.topology}, {thought.placement}" if thought.length else "none"
  which = f"step {step} of {path}" + (", averaged parameters" if _AVERAGED.value else "")
  counts = f"{values['rows']} rows, {values['real_tokens']} real tokens, {values['think_tokens']} think tokens"
  parts = values["seconds"].values()
  seconds = sum(part["first_batch"] + part["other_batches"] for part in parts)
  return f"{which}; thoughts: {what}\n{values['split']}: {counts}, {seconds:.1f} s\n"


def _name(path, step: int, digest: str) -> str:
  """What the result's files are called."""
  from thinking_lm.evaluation import summary
  from thinking_lm.training.checkpoint import read_manifest

  trained_on = read_manifest(path / "checkpoints" / str(step))["identity"]["data"]
  changes = "".join(f"-{change.replace('/', '_')}" for change in _THOUGHT.value)
  return summary.file_name(_SPLIT.value, step, _AVERAGED.value, digest, trained_on) + changes


def _draw(path, name: str, step: int, calibration: dict[str, Any] | None) -> str:
  """Draws the reliability diagram and says where it is, or why there is none."""
  from thinking_lm.evaluation import diagram

  if calibration is None:
    return "no reliability diagram: no target counts"
  picture = diagram.reliability(calibration, f"{path.name}, step {step}, {_SPLIT.value}")
  if picture is None:
    return diagram.MISSING
  file = path / "evaluation" / f"{name}-reliability.png"
  _put(file, lambda: file.write_bytes(picture))
  return f"drawn: {file}"


def _put(file, write) -> None:
  """Makes the directory and writes. Raises WorkdirError."""
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    write()
  except OSError as error:
    raise WorkdirError(f"cannot write {file}: {error}") from error


def _write(path, name: str, step: int, subject, values: dict[str, Any]):
  """Writes the result, whole or not at all. Returns its path."""
  from thinking_lm.training import storage, workdir

  file = path / "evaluation" / f"{name}.json"
  record = dict(
    command=shlex.join(["python", "-m", "thinking_lm.evaluate", *sys.argv[1:]]),
    step=step,
    averaged=_AVERAGED.value,
    limit=_LIMIT.value or None,
    batch_size=_BATCH.value,
    seed=_SEED.value,
    data=subject.data.digest,
    thought=dataclasses.asdict(subject.config.thought),
    code=workdir.code_version(),
    written=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    **values,
  )
  _put(file, lambda: storage.write_atomic(file, storage.canonical(record, indent=2) + "\n"))
  return file


if __name__ == "__main__":
  __doc__ = __doc__.replace("%", "%%")  # What absl prints for --help.
  errors.run(main)
