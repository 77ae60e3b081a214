"""What thinking buys and what it costs, over several evaluated runs: accuracy and nats against think tokens.

  python -m thinking_lm.evaluate --workdir=RUN --split=test --controls=own,none      (once for each run)
  python -m thinking_lm.frontier [--split=test] RUN...

Prints one line for each evaluation at a run's latest step, cheapest first. A star marks those that no other one beats:
none of the others predicts better with as few think tokens. Runs that differ in objective.price alone trace a frontier;
so do evaluations of one run with other thoughts (`evaluate --thought=...`), placements at equal numbers of them.

Exit codes: 0 done, 64 wrong command line, 65 damaged evaluation, 78 not an evaluated run.
"""

from absl import flags

from thinking_lm import errors
from thinking_lm.errors import UsageError

_SPLIT = flags.DEFINE_string("split", "test", "Which split's evaluations.")


def main(argv) -> None:
  """Reads, prints."""
  if len(argv) < 2:
    raise UsageError("name one work directory or more; see --help")
  from thinking_lm.evaluation import frontier

  print(frontier.table([point for run in argv[1:] for point in frontier.read(run, _SPLIT.value)]))


if __name__ == "__main__":
  errors.run(main, names=True)
