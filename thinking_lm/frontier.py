"""What thinking buys and what it costs, over several runs: accuracy and nats against think tokens.

  python -m thinking_lm.frontier RUN...                             evaluated work directories
  python -m thinking_lm.frontier --config=FILE --root=DIR ARM...    trains and evaluates them first

Prints one line for each evaluation at a run's latest step, cheapest first, then one for each arm: runs that differ in
their seeds only, with Student's interval over them. A star marks those that no other one beats: none of the others
predicts better with as few think tokens. Runs that differ in objective.price alone trace a frontier; so do placements
at equal numbers of thoughts, as runs of their own or as evaluations of one run (`evaluate --thought=...`). A plot goes
to --plot.

With --config each ARM is a recipe of that file, options, or both, joined by commas: `latent`, `objective.price=0.1`,
`latent,thought.stride=4`. `{seed}` stands for the seed, as in thought.proxy=DIR/none-{seed}. Every arm is trained with
each of --seeds seeds into DIR/ARM-SEED and evaluated there, by the commands `train` and `evaluate`; what has been
evaluated is not run again. Examples:

  python -m thinking_lm.frontier --config=configs/parity.py --root=runs/parity objective.price=0 objective.price=0.1
  python -m thinking_lm.frontier --config=configs/placement.py --root=runs/placement none stride entropy router

Exit codes: 0 done, 64 wrong command line, 65 damaged evaluation, 73 the plot cannot be written, 78 not an evaluated
run; that of `train` or `evaluate` where one of them failed.
"""

import pathlib

from absl import flags

from thinking_lm import errors
from thinking_lm.errors import UsageError, WorkdirError

_SPLIT = flags.DEFINE_string("split", "test", "Which split's evaluations.")
_CONFIG = flags.DEFINE_string("config", None, "Config file of the arms; without it, names are work directories.")
_ROOT = flags.DEFINE_string("root", None, "Where the arms' work directories go.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each arm.", lower_bound=1)
_PLOT = flags.DEFINE_string("plot", "", "PNG file of the arms; default: frontier.png in --root, else none.")


def main(argv) -> None:
  """Trains and evaluates where asked to, reads, prints, draws."""
  if len(argv) < 2:
    raise UsageError("name one work directory or more, or with --config one arm or more; see --help")
  if bool(_CONFIG.value) != bool(_ROOT.value):
    raise UsageError("--config and --root go together: what the arms are, and where their work directories go")
  from thinking_lm.evaluation import arms as arms_lib
  from thinking_lm.evaluation import frontier

  comparison = arms_lib.Comparison(_CONFIG.value, _ROOT.value, _SEEDS.value, _SPLIT.value)
  where = arms_lib.runs(comparison, argv[1:]) if _CONFIG.value else argv[1:]
  points = [point for run in where for point in frontier.read(run, _SPLIT.value)]
  arms = frontier.arms(points)
  print(f"{frontier.table(points)}\n\n{frontier.arms_table(arms)}")
  plot = _PLOT.value or (f"{_ROOT.value}/frontier.png" if _ROOT.value else "")
  if plot:
    print(_draw(pathlib.Path(plot), frontier.picture(arms)))


def _draw(path: pathlib.Path, picture: bytes | None) -> str:
  from thinking_lm.evaluation.diagram import MISSING

  if picture is None:
    return f"no plot: {MISSING.split(': ', 1)[1]}"
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture)
  except OSError as error:
    raise WorkdirError(f"cannot write --plot={path}: {error.strerror}") from error
  return f"drawn: {path}"


if __name__ == "__main__":
  errors.run(main, names=True)
