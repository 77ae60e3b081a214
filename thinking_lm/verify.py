"""Scores candidates with a verifier, and what choosing by its scores is worth: best-of-N beside majority vote.

  python -m thinking_lm.verify --workdir=VERIFIER --candidates=FILE.jsonl [--rationales=8] [--most=16]

FILE is what `thinking_lm.candidates` wrote (without --distinct and --balance, which would change what is voted on).
The verifier is a run on data.source=verdicts. Its score of a candidate is the mean of p(Yes) over --rationales draws of
its thoughts, or of rationales that it writes itself if it was trained to (data.verdicts.rationale). The result is
printed and written into the run's work directory, with the scores in the order of the lines.

Exit codes: 0 done, 64 wrong command line, 65 damaged data or checkpoints, 73 the result cannot be written, 78 wrong
config.
"""

import sys

from absl import flags

from thinking_lm import errors
from thinking_lm.errors import ConfigError, UsageError, WorkdirError

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the verifier's run.")
_CANDIDATES = flags.DEFINE_string("candidates", None, "Globs of JSONL files, separated by commas.")
_RATIONALES = flags.DEFINE_integer("rationales", 1, "K thoughts or written rationales for each.", lower_bound=1)
_MOST = flags.DEFINE_integer("most", 0, "Candidates of a problem, the first ones; 0: all.", lower_bound=0)
_BATCH = flags.DEFINE_integer("batch_size", 32, "Candidates at once.", lower_bound=1)
_LONGEST = flags.DEFINE_integer("longest", 128, "Tokens of a written rationale at most.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of what is drawn.", lower_bound=0, upper_bound=2**32 - 1)


def main(argv) -> None:
  """Loads, scores, prints and writes."""
  del argv
  if not _WORKDIR.value or not _CANDIDATES.value:
    raise UsageError("--workdir=VERIFIER and --candidates=FILE.jsonl are needed; see --help")
  from thinking_lm import experiment
  from thinking_lm.data import verdicts
  from thinking_lm.evaluation import verifiers
  from thinking_lm.training import state, storage, workdir

  subject, params, step = experiment.load(_WORKDIR.value, rows=False)
  if subject.config.data.source != "verdicts":
    raise ConfigError(f"{_WORKDIR.value} is no verifier: it was trained on data.source={subject.config.data.source}")
  lines = verdicts.read(_CANDIDATES.value, "--candidates")
  draws, K = state.key(_SEED.value, "evaluate"), _RATIONALES.value
  scores_X = scores(subject, params, lines, draws, K)
  most = _MOST.value or None
  choice, judgement = verifiers.choose(lines, scores_X, most), verifiers.judge(lines, scores_X)
  sizes = {len(numbers[:most]) for numbers in verifiers.by_prompt(lines).values()}
  values = dict(
    step=step,
    candidates=len(lines),
    problems=len(verifiers.by_prompt(lines)),
    of_each=sorted(sizes),
    rationales=K,
    **{name: value for part in (choice, judgement) for name, value in part._asdict().items()},
    scores=scores_X.tolist(),
  )
  print(verifiers.table(choice, judgement, sorted(sizes), K))
  path = workdir.resolve(_WORKDIR.value) / "evaluation" / f"verify-{step}.json"
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(path, storage.canonical(values, indent=2) + "\n")
  except OSError as error:
    raise WorkdirError(f"cannot write {path}: {error}") from error
  print(f"written: {path}")


def scores(subject, params, lines, key, K: int):
  """scores_X: the mean of K scores of each line."""
  import jax

  from thinking_lm.data import verdicts
  from thinking_lm.evaluation import verifiers
  from thinking_lm.evaluation.continuations import continuations
  from thinking_lm.evaluation.progress import Progress
  from thinking_lm.model.generate import Sampling

  scorer = verifiers.Scorer(subject, _BATCH.value)
  if not subject.config.data.verdicts.rationale:
    draws = K if subject.config.thought.length and subject.config.thought.kind_of.stochastic else 1
    if draws < K:
      print(f"--rationales={K} would all be equal: this verifier draws nothing; 1 is used", file=sys.stderr)
    questions = [verdicts.opening(line, subject.config.data.verdicts) for line in lines]
    return scorer(params, questions, key, draws).mean(axis=1)
  total = 0.0
  for k in range(K):
    own = jax.random.fold_in(key, k)
    write = lambda heads, own=own: continuations(
      subject, params, heads, own, Sampling(_LONGEST.value), _BATCH.value, Progress()
    )
    total = total + scorer(params, verifiers.written(lines, write), own, 1)[:, 0]
  return total / K


if __name__ == "__main__":
  errors.run(main)
