"""Is what is said to be likely as likely as that? Calibration of what thoughts report, and of the softmax beside it.

A *forecast* is a probability f of the token that a forecaster holds most likely (of a report: the named one that it
gives most), and whether that token came, o in {0, 1}. Forecasts are counted in BINS bins of equal width, the last one
closed: with n_k of N forecasts in bin k, f_k and o_k their means,

    ECE          = sum_k n_k / N |f_k - o_k|          (Guo et al. 2017, arXiv:1706.04599; of the top label, 15 bins)
    Brier        = mean (f - o)^2  =  reliability - resolution + uncertainty + within       (Murphy 1973)
    reliability  = sum_k n_k / N (f_k - o_k)^2      resolution = sum_k n_k / N (o_k - o)^2      uncertainty = o (1 - o)

`within` is what forecasts of one bin differ by (Stephenson et al. 2008, doi:10.1175/2007WAF2006116.1): 0 where they are
equal. An ECE is biased upwards by about sqrt(bins / N): with few forecasts no forecaster has an ECE of 0.

Everything is a sum over the forecasts of a row, so that batches add up and rows can be resampled for intervals.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from thinking_lm.evaluation.intervals import LEVEL
from thinking_lm.objectives.scores import distribution, happened
from thinking_lm.types import Report

BINS = 15
RESAMPLES = 400


class Forecasts(NamedTuple):
  """Sums of each row over the forecasts of a bin: how many, their probabilities, how many came true, (f - o)^2."""

  count_RK: np.ndarray
  forecast_RK: np.ndarray
  came_RK: np.ndarray
  square_RK: np.ndarray

  @classmethod
  def of(cls, forecast_RX, came_RX, counted_RX) -> "Forecasts":
    """The sums of forecasts [R, X]; only those that are `counted` (bool) exist."""
    counted_RX = np.asarray(counted_RX, bool)
    forecast_RX = np.where(counted_RX, np.asarray(forecast_RX, np.float64), 0.0)
    came_RX = np.where(counted_RX, np.asarray(came_RX, np.float64), 0.0)
    bin_RX = np.minimum((forecast_RX * BINS).astype(np.int64), BINS - 1)
    R = len(bin_RX)
    place_RX = bin_RX + BINS * np.arange(R)[:, None]
    terms = (counted_RX, forecast_RX, came_RX, (forecast_RX - came_RX) ** 2)
    flat = (np.bincount(place_RX.ravel(), a.ravel().astype(np.float64), R * BINS) for a in terms)
    return cls(*(a.reshape(R, BINS) for a in flat))


class Gap(NamedTuple):
  """Sums of each row over reports, between what is said and what the model's softmax does after the same thought.

  named: mean over the named tokens of |said - softmax|. variation: total variation over the named tokens and *other*,
  half the sum of all differences, in [0, 1]. count: reports.
  """

  named_R: np.ndarray
  variation_R: np.ndarray
  count_R: np.ndarray


class Calibration(NamedTuple):
  """Forecasters by name, on the same targets, and the gap between them where thoughts report."""

  forecasts: Mapping[str, Forecasts]
  gap: Gap | None


def calibrate(top_logp_BT, hit_BT, asked_BT, report: Report | None) -> Calibration:
  """The calibration of a batch, under one draw of its thoughts.

  Args:
    top_logp_BT, hit_BT: log-probability of the most likely token, and whether it is the target.
    asked_BT: bool, the targets that count. With a report only those that one was given of.
  """
  softmax_BT = np.exp(np.asarray(top_logp_BT, np.float64))
  if report is None:
    return Calibration(dict(softmax=Forecasts.of(softmax_BT, hit_BT, asked_BT)), None)
  at_BN = np.minimum(report.anchors_BN, softmax_BT.shape[1] - 1)
  pick = lambda a_BT: np.take_along_axis(np.asarray(a_BT), at_BN, axis=1)
  counted_BN = (np.asarray(report.weight_BN) > 0) & pick(asked_BT)
  candidates_BNI, confidences_BNI = (np.asarray(a)[:, 0] for a in (report.candidates_BGNI, report.confidences_BGNI))
  spoken = distribution(candidates_BNI, confidences_BNI, report.vocabulary)
  said_BNZ, named_BNI = np.asarray(spoken.mass_XZ, np.float64), np.asarray(spoken.size_XZ)[..., :-1] > 0
  hit_BNZ = np.asarray(happened(candidates_BNI, np.asarray(report.target_BN)))
  best_BN1 = said_BNZ[..., :-1].argmax(axis=-1)[..., None]
  best = lambda a_BNZ: np.take_along_axis(a_BNZ, best_BN1, axis=-1)[..., 0]
  does_BNI = np.where(named_BNI, np.asarray(report.actual_BGNI, np.float64)[:, 0], 0.0)
  off_BNI = np.abs(said_BNZ[..., :-1] - does_BNI)
  other_BN = np.abs(said_BNZ[..., -1] - (1 - does_BNI.sum(axis=-1)))
  row = lambda a_BN: np.where(counted_BN, a_BN, 0.0).sum(axis=1)
  return Calibration(
    dict(
      report=Forecasts.of(best(said_BNZ), best(hit_BNZ), counted_BN),
      softmax=Forecasts.of(pick(softmax_BT), pick(hit_BT), counted_BN),
    ),
    Gap(row(off_BNI.sum(axis=-1) / named_BNI.sum(axis=-1)), row((off_BNI.sum(axis=-1) + other_BN) / 2), row(1.0)),
  )


def joined(parts: Sequence[Calibration], kept: Sequence[np.ndarray]) -> Calibration:
  """The rows of several batches that are `kept` (bool), in order."""
  join = lambda sums: type(sums[0])(
    *(np.concatenate([a[keep] for a, keep in zip(each, kept, strict=True)]) for each in zip(*sums, strict=True))
  )
  names = parts[0].forecasts
  gap = None if parts[0].gap is None else join([part.gap for part in parts])
  return Calibration({name: join([part.forecasts[name] for part in parts]) for name in names}, gap)


def measures(count_K, forecast_K, came_K, square_K) -> dict[str, np.ndarray]:
  """The numbers above from the sums of bins [..., K]."""
  with np.errstate(invalid="ignore", divide="ignore"):
    N = count_K.sum(axis=-1)
    share_K = count_K / N[..., None]
    f_K, o_K = (np.where(count_K > 0, a / count_K, 0.0) for a in (forecast_K, came_K))
    o = came_K.sum(axis=-1) / N
    brier = square_K.sum(axis=-1) / N
    forecast = forecast_K.sum(axis=-1) / N
  found = dict(
    ece=(share_K * np.abs(f_K - o_K)).sum(axis=-1),
    brier=brier,
    reliability=(share_K * (f_K - o_K) ** 2).sum(axis=-1),
    resolution=(share_K * (o_K - o[..., None]) ** 2).sum(axis=-1),
    uncertainty=o * (1 - o),
  )
  within = brier - found["reliability"] + found["resolution"] - found["uncertainty"]
  return found | dict(within=within, forecast=forecast, accuracy=o)


def _intervals(of, sums: Sequence[np.ndarray]) -> dict[str, list[float | None]]:
  """Each number that `of` makes of sums over rows, with a percentile bootstrap interval over rows (Efron 1979)."""
  values, rows = of(*(a.sum(axis=0) for a in sums)), len(sums[0])
  if rows < 2:
    return {name: [float(value), None, None] for name, value in values.items()}
  weights_XR = np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES).astype(np.float64)
  again = of(*(weights_XR @ a for a in sums))
  ends = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
  return {name: [float(value), *map(float, np.quantile(again[name], ends))] for name, value in values.items()}


def summarise(found: Calibration) -> dict[str, Any] | None:
  """JSON values: the measures of each forecaster as [value, low, high], its bins, and the gap. None without forecasts.

  Intervals are of resampled rows; bounds are null for a single row. Of a bin that nothing fell into, the means are
  null.
  """
  counts_R = next(iter(found.forecasts.values())).count_RK.sum(axis=1)
  kept_R = counts_R > 0
  if not kept_R.any():
    return None
  values: dict[str, Any] = dict(bins=BINS, forecasts=int(counts_R.sum()), forecasters={}, gap=None)
  for name, forecasts in found.forecasts.items():
    sums = [a[kept_R] for a in forecasts]
    values["forecasters"][name] = _intervals(measures, sums) | dict(bins=_bins(*(a.sum(axis=0) for a in sums)))
  if found.gap is not None:
    values["gap"] = _intervals(_gap, [a[kept_R] for a in found.gap])
  return values


def _gap(named, variation, count) -> dict[str, np.ndarray]:
  return dict(named=named / count, variation=variation / count)


def _bins(count_K, forecast_K, came_K, square_K) -> dict[str, list]:
  del square_K
  mean = lambda a_K: [float(a / n) if n else None for a, n in zip(a_K, count_K, strict=True)]
  return dict(count=count_K.astype(int).tolist(), forecast=mean(forecast_K), accuracy=mean(came_K))
