"""Samples a solver's answers to its task and checks them: the data that a verifier learns from.

  python -m thinking_lm.candidates --workdir=SOLVER --output=FILE.jsonl [--split=train] [--problems=1000] [--samples=8]

Every line has prompt, candidate, correct, answer and, where a program can write one, rationale. Problems are the first
ones of the split; the lines of one problem stand together. --distinct writes each candidate of a problem once, with its
number of occurrences as `count`; --balance keeps as many right as wrong candidates of each problem (the first ones).

Exit codes: 0 done, 64 wrong command line, 65 damaged data or checkpoints, 73 the output cannot be written, 78 wrong
config.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from thinking_lm import errors
from thinking_lm.errors import ConfigError, UsageError, WorkdirError

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the solver's run.")
_OUTPUT = flags.DEFINE_string("output", None, "The JSONL file to write.")
_SPLIT = flags.DEFINE_string("split", "train", "Split of the solver's task.")
_PROBLEMS = flags.DEFINE_integer("problems", 1000, "Problems, the first ones of the split.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 8, "Candidates of each problem.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Of the candidates; 0: always the most likely.", lower_bound=0.0)
_BATCH = flags.DEFINE_integer("batch_size", 64, "Candidates at once.", lower_bound=1)
_DISTINCT = flags.DEFINE_bool("distinct", False, "Each candidate of a problem once.")
_BALANCE = flags.DEFINE_bool("balance", False, "As many right as wrong candidates of each problem.")
_SEED = flags.DEFINE_integer("seed", 0, "Of what is drawn.", lower_bound=0, upper_bound=2**32 - 1)


def lines_of(task, example, candidates: Sequence[bytes]) -> list[dict]:
  """The lines of one problem."""
  from thinking_lm.data import rationales

  text = lambda data: data.decode(errors="replace")
  lines = [
    dict(
      prompt=text(example.prompt),
      candidate=text(candidate),
      correct=task.score(example, candidate) == 1,
      answer=text(example.answer),
    )
    for candidate in candidates
  ]
  if task.options.name in rationales.STEPS:
    steps = rationales.STEPS[task.options.name](example.prompt, task.options.modulus)
    written = text(rationales.shown(steps, rationales.final(example.answer)))
    lines = [line | dict(rationale=written) for line in lines]
  if _DISTINCT.value:
    texts = [line["candidate"] for line in lines]
    lines = [line | dict(count=texts.count(line["candidate"])) for line in lines]
    lines = [line for number, line in enumerate(lines) if texts.index(line["candidate"]) == number]
  if _BALANCE.value:
    kinds = [[line for line in lines if line["correct"] is correct] for correct in (True, False)]
    kept = min(map(len, kinds))
    lines = [line for line in lines if any(line is each for kind in kinds for each in kind[:kept])]
  return lines


def main(argv) -> None:
  """Samples, checks, writes."""
  del argv
  if not _WORKDIR.value or not _OUTPUT.value:
    raise UsageError("--workdir=SOLVER and --output=FILE.jsonl are needed; see --help")
  from thinking_lm import experiment
  from thinking_lm.evaluation.continuations import continuations
  from thinking_lm.evaluation.progress import Progress
  from thinking_lm.model.generate import Sampling
  from thinking_lm.training import state, storage

  subject, params, step = experiment.load(_WORKDIR.value)
  task = subject.data.task
  if task is None or task.tagging or subject.config.data.source != "task":
    raise ConfigError(f"{_WORKDIR.value} was not trained on a text task: there is no verifier to check answers with")
  if _SPLIT.value not in subject.data.splits:
    raise UsageError(f"unknown split {_SPLIT.value!r}; known: {', '.join(subject.data.splits)}")
  examples = subject.data.examples(_SPLIT.value, _PROBLEMS.value)
  room = max(len(example.answer) for example in examples) + 8
  sampling = Sampling(room, temperature=_TEMPERATURE.value, samples=_SAMPLES.value)
  key = state.key(_SEED.value, "generate")
  texts = continuations(subject, params, [each.prompt for each in examples], key, sampling, _BATCH.value, Progress())
  lines = []
  for number, example in enumerate(examples):
    lines += lines_of(task, example, texts[number * _SAMPLES.value : (number + 1) * _SAMPLES.value])
  path = pathlib.Path(_OUTPUT.value)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))
  except OSError as error:
    raise WorkdirError(f"cannot write --output={path}: {error.strerror}") from error
  right = sum(line["correct"] for line in lines)
  print(f"{len(lines)} candidates for {len(examples)} problems, {right} of them right, by step {step}: {path}")
  if not lines:
    print("warning: no line was written: no problem has right and wrong candidates", file=sys.stderr)


if __name__ == "__main__":
  errors.run(main)
