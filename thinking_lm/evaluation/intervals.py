"""Confidence intervals. Rows are the independent units: targets of one row share a past, so they are never counted as
independent.
"""

import math
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
Z = 1.959963984540054
"""The normal quantile at (1 + LEVEL) / 2."""


class Interval(NamedTuple):
  """An estimate and its 95 % confidence interval; bounds are None where fewer than two rows tell the spread."""

  value: float
  low: float | None
  high: float | None


def ratio(total_R, count_R) -> Interval | None:
  """sum(total) / sum(count) over R rows, with the normal interval of the linearised ratio.

      r = sum S_i / sum C_i,   se = sqrt(R / (R - 1) sum (S_i - r C_i)^2) / sum C_i   (Cochran 1977, section 6.4)

  With equal counts this is mean +- Z s / sqrt(R). For a paired difference, give the differences of the sums. None where
  nothing was counted.
  """
  total_R, count_R = np.asarray(total_R, np.float64), np.asarray(count_R, np.float64)
  R, count = len(total_R), count_R.sum()
  if count == 0:
    return None
  value = float(total_R.sum() / count)
  if R < 2:
    return Interval(value, None, None)
  error = math.sqrt(R / (R - 1) * float(np.sum((total_R - value * count_R) ** 2))) / float(count)
  return Interval(value, value - Z * error, value + Z * error)


def wilson(share: float, number: float) -> Interval:
  """Wilson's (1927) interval of a share of `number` independent trials; it stays within [0, 1] and has a width at both
  ends.
  """
  middle = (share + Z**2 / (2 * number)) / (1 + Z**2 / number)
  half = Z / (1 + Z**2 / number) * math.sqrt(share * (1 - share) / number + Z**2 / (4 * number**2))
  return Interval(share, min(max(middle - half, 0.0), share), max(min(middle + half, 1.0), share))


def share(hits_R, count_R) -> Interval | None:
  """sum(hits) / sum(count) over R rows, with Wilson's interval at the number of trials that the rows are worth.

  That number is p (1 - p) / se^2 with the se of `ratio` (the labels divided by the design effect), at least the number
  of rows and at most the number of labels; where rows do not differ (all right, say), it is the number of rows. With
  one label a row it is Wilson's interval itself. None where nothing was counted.
  """
  hits_R, count_R = np.asarray(hits_R, np.float64), np.asarray(count_R, np.float64)
  kept = count_R > 0
  rows, labels = int(kept.sum()), float(count_R.sum())
  rough = ratio(hits_R[kept], count_R[kept])
  if rough is None:
    return None
  p = rough.value
  worth = float(rows)
  if rough.low is not None and rough.high > rough.low and 0 < p < 1:
    error = (rough.high - rough.low) / (2 * Z)
    worth = min(max(p * (1 - p) / error**2, rows), labels)
  return wilson(p, worth)


STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's quantile at (1 + LEVEL) / 2 for 1 ... 9 degrees of freedom."""


def over_runs(values) -> Interval:
  """Mean over n independent runs with Student's interval, mean +- t s / sqrt(n); of a single run without one.

  Above ten runs t is its expansion in 1 / (n - 1) about the normal quantile, to second order (error below 0.004).
  """
  values = np.asarray(values, np.float64)
  value, free = float(values.mean()), len(values) - 1
  if not free:
    return Interval(value, None, None)
  t = Z + (Z**3 + Z) / (4 * free) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * free**2)
  t = STUDENT[free - 1] if free <= len(STUDENT) else t
  half = t * float(values.std(ddof=1)) / math.sqrt(free + 1)
  return Interval(value, value - half, value + half)
