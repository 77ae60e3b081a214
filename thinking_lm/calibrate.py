"""Which threshold makes which share of the places think, from past data: for placement by need and for learned ends.

  python -m thinking_lm.calibrate --workdir=DIR [--split=train] [--rows=256] [--shares=0.5,0.25]

Prints, for a few shares, the next-token entropy (nats, without thoughts) that this share of the tokens is above by the
run's model: a value for thought.need_above, and how many thoughts it makes in a row at most of the rows looked at, for
thought.room. The run may be the one that thinks, or the frozen one that thought.proxy names.

Of a run whose thoughts a head ends (thought.halting router or ponder) it prints, for the same shares, the
thought.stop_at at which this share of its thoughts uses a think token at all: `evaluate --thought=stop_at=VALUE` then
thinks as often as a placement that it is compared with.

Exit codes: 0 done, 64 wrong command line, 65 damaged data or checkpoints, 78 wrong config.
"""

import functools
from collections.abc import Sequence

from absl import flags

from thinking_lm import errors
from thinking_lm.errors import UsageError

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a trained run.")
_SPLIT = flags.DEFINE_string("split", "train", "Data that thresholds come from; not what is evaluated later.")
_ROWS = flags.DEFINE_integer("rows", 256, "How many rows are looked at.", lower_bound=1)
_SHARES = flags.DEFINE_list("shares", ["0.5", "0.25", "0.125", "0.0625", "0.03125"], "Shares of the places that think.")
_BATCH = flags.DEFINE_integer("batch_size", 32, "Rows at once; changes memory and speed only.", lower_bound=1)


def main(argv) -> None:
  """Loads, looks, prints."""
  del argv
  if not _WORKDIR.value:
    raise UsageError("--workdir=DIR is needed; see --help")
  shares = _shares(_SHARES.value)
  from thinking_lm import experiment
  from thinking_lm.sharding import on_mesh_of

  subject, params, step = experiment.load(_WORKDIR.value)
  batches = lambda: subject.data.evaluation_batches(_SPLIT.value, batch_size=_BATCH.value, limit=_ROWS.value)
  source = f"step {step} of {_WORKDIR.value}"
  with on_mesh_of(params):
    print(_by_need(subject, params, batches(), source, shares))
    if subject.config.thought.learns_end:
      print("\n" + _by_end(subject, params, batches(), source, shares))


def _shares(given: Sequence[str]) -> list[float]:
  """Raises UsageError for what is no share."""
  try:
    shares = [float(share) for share in given]
  except ValueError:
    shares = []
  if not shares or not all(0 < share < 1 for share in shares):
    raise UsageError(f"--shares wants numbers between 0 and 1, got {','.join(given)!r}; e.g. --shares=0.5,0.01")
  return shares


def _named(share: float) -> str:
  return f"1 / {1 / share:.4g}"


def _by_need(subject, params, batches, source: str, shares: Sequence[float]) -> str:
  import jax
  import numpy as np

  from thinking_lm.evaluation.summary import aligned
  from thinking_lm.model.need import needed

  look = jax.jit(functools.partial(needed, subject.model))
  needs, real = [], []
  for batch in batches:
    needs.append(np.asarray(look(params, batch).need_BT))
    real.append(batch.segments_BT > 0)
  need_RT, real_RT = np.concatenate(needs), np.concatenate(real)
  rows = [("share of tokens", "thought.need_above", "most in a row")]
  for share in shares:
    above = float(np.quantile(need_RT[real_RT], 1 - share))
    rows.append((_named(share), f"{above:.4f}", str(int(((need_RT > above) & real_RT).sum(axis=1).max()))))
  return f"{source}, {int(real_RT.sum())} tokens of {_SPLIT.value}\n{aligned(rows)}"


def _by_end(subject, params, batches, source: str, shares: Sequence[float]) -> str:
  import jax
  import numpy as np

  from thinking_lm.evaluation.summary import aligned

  def at_once(params, batch, key):
    """(log-probability [B, N] of ending at the anchor, by the first sample; which thoughts there are)."""
    trace = subject.rollout(params, batch, key)
    return trace.exit_logp_BGNK[:, 0, :, 0], trace.valid_BN

  look = jax.jit(at_once)
  found = [look(params, batch, jax.random.key(0)) for batch in batches]
  logp_X = np.concatenate([np.asarray(logp_BN, np.float64)[np.asarray(valid_BN)] for logp_BN, valid_BN in found])
  rows = [("share that thinks", "thought.stop_at")]
  rows += [(_named(share), f"{np.exp(np.quantile(logp_X, share)):.6g}") for share in shares]
  return f"{source}, {len(logp_X)} thoughts of {_SPLIT.value}\n{aligned(rows)}"


if __name__ == "__main__":
  errors.run(main)
