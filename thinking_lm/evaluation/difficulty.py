"""Does a model think longer about what is harder? Think tokens used and right answers by the difficulty of an example.

Difficulty is the task's own number (`data.tasks.Task.difficulty`). The correlation is Spearman's (1904), of ranks with
ties at their mean; its interval is that of resampled rows. None where all rows are equally hard or use equally much.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from thinking_lm.evaluation.intervals import LEVEL, wilson

RESAMPLES = 400


class Difficulty(NamedTuple):
  """By row, float64: how hard it is, think tokens that it used, and 1 where every answer is right."""

  level_R: np.ndarray
  used_R: np.ndarray
  right_R: np.ndarray


def ranks(values_R) -> np.ndarray:
  """Ranks from 1, equal values at the mean of theirs."""
  _, index_R, count_K = np.unique(values_R, return_inverse=True, return_counts=True)
  return (np.cumsum(count_K) - (count_K - 1) / 2)[index_R]


def spearman(a_R, b_R) -> float | None:
  """Correlation of ranks; None where one of the two does not vary."""
  a_R, b_R = (ranks(x_R) - (len(x_R) + 1) / 2 for x_R in (a_R, b_R))
  scale = float(np.sqrt((a_R**2).sum() * (b_R**2).sum()))
  return float((a_R * b_R).sum()) / scale if scale else None


def summarise(found: Difficulty, of: Callable = spearman) -> Mapping[str, Any]:
  """JSON values: the correlation as [value, low, high], and by level rows, think tokens a row, and accuracy."""
  value, rows = of(found.used_R, found.level_R), len(found.level_R)
  interval = [value, None, None]
  if value is not None:
    picks = np.random.default_rng(0).integers(rows, size=(RESAMPLES, rows))
    again = [of(found.used_R[pick], found.level_R[pick]) for pick in picks]
    ends = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    interval[1:] = map(float, np.quantile([0.0 if one is None else one for one in again], ends))
  levels = []
  for level in np.unique(found.level_R):
    here_R = found.level_R == level
    accuracy = wilson(float(found.right_R[here_R].mean()), int(here_R.sum()))
    levels.append(
      dict(level=float(level), rows=int(here_R.sum()), used=float(found.used_R[here_R].mean()), accuracy=list(accuracy))
    )
  return dict(correlation=interval, levels=levels)
