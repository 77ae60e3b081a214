"""What thinking buys and what it costs, over several evaluated runs: accuracy and nats against think tokens.

  python -m thinking_lm.evaluate --workdir=RUN --split=test --controls=own,none      (once for each run)
  python -m thinking_lm.frontier [--split=test] RUN...

Prints one line for each run, cheapest first. A star marks the runs that no other one beats: none of the others predicts
better with as few think tokens. Runs that differ in objective.price, thought.length, thought.halting or
thought.placement alone trace a frontier; placements compare at equal think tokens.

Exit codes: 0 done, 64 wrong command line, 65 damaged evaluation, 78 not an evaluated run.
"""

from absl import flags

from thinking_lm import errors
from thinking_lm.errors import UsageError

_SPLIT = flags.DEFINE_string("split", "test", "Which evaluation of each run: the latest of this split.")


def main(argv) -> None:
  """Reads, prints."""
  if len(argv) < 2:
    raise UsageError("name one work directory or more; see --help")
  from thinking_lm.evaluation import frontier

  print(frontier.table([frontier.read(run, _SPLIT.value) for run in argv[1:]]))


if __name__ == "__main__":
  errors.run(main)
