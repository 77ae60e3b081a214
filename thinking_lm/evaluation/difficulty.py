"""Does a model think longer about what is harder? Think tokens used and right answers by difficulty.

Difficulty is the task's own number (`data.tasks.Task.difficulty`), of an example with one answer or of each label of a
row. The correlation is Spearman's (1904), of ranks with ties at their mean; its interval is that of resampled rows.
None where everything is equally hard or uses equally much.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from thinking_lm.evaluation.intervals import LEVEL, wilson

RESAMPLES = 400


class Difficulty(NamedTuple):
  """By row and answer of it, float64: how hard it is (NaN: there is none), think tokens that it used, 1 where right."""

  level_RU: np.ndarray
  used_RU: np.ndarray
  right_RU: np.ndarray


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
  """JSON values: the correlation as [value, low, high], and by level answers, think tokens for each, and accuracy."""
  there_RU = ~np.isnan(found.level_RU)

  def correlation(rows):
    inside = there_RU[rows]
    return of(found.used_RU[rows][inside], found.level_RU[rows][inside])

  rows = len(there_RU)
  value = correlation(slice(None))
  interval = [value, None, None]
  if value is not None:
    again = [correlation(pick) for pick in np.random.default_rng(0).integers(rows, size=(RESAMPLES, rows))]
    ends = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    interval[1:] = map(float, np.quantile([0.0 if one is None else one for one in again], ends))
  levels = []
  for level in np.unique(found.level_RU[there_RU]):
    here_RU = found.level_RU == level
    count, used = int(here_RU.sum()), float(found.used_RU[here_RU].mean())
    accuracy = wilson(float(found.right_RU[here_RU].mean()), count)
    levels.append(dict(level=float(level), answers=count, used=used, accuracy=list(accuracy)))
  return dict(correlation=interval, levels=levels)
