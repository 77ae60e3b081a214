"""How far an evaluation is, for people."""

import sys
import time

import tqdm

SECONDS_BETWEEN_LINES = 10.0


class Progress:
  """A bar on a terminal, else a line every few seconds, on stderr: rows done of all, and time left."""

  def __init__(self):
    self._start = self._printed = time.monotonic()
    self._bar = None

  def __call__(self, done: int, total: int) -> None:
    """`done` of `total` rows are finished."""
    if sys.stderr.isatty():
      if self._bar is None:
        self._bar = tqdm.tqdm(total=total, unit="row", desc="evaluate", file=sys.stderr)
      self._bar.update(done - self._bar.n)
      if done >= total:
        self._bar.close()
    elif time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
      self._printed = time.monotonic()
      left = (self._printed - self._start) / done * (total - done)
      print(f"evaluate: {done}/{total} rows, {left:.0f} s left", file=sys.stderr, flush=True)
