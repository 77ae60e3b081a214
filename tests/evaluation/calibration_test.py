"""Calibration against sums by hand: bins, the decomposition, what a report says against what the softmax does."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.evaluation.harness import make, run
from thinking_lm.evaluation import diagram
from thinking_lm.evaluation.calibration import BINS, Calibration, Forecasts, calibrate, joined, measures, summarise
from thinking_lm.types import Report

RNG = np.random.default_rng(0)


def by_hand(forecasts, came):
  """The numbers of a list of forecasts, from their definitions, with loops."""
  N, o = len(forecasts), sum(came) / len(came)
  bins = {}
  for f, c in zip(forecasts, came, strict=True):
    bins.setdefault(min(int(f * BINS), BINS - 1), []).append((f, c))
  means = [(len(b), sum(f for f, _ in b) / len(b), sum(c for _, c in b) / len(b)) for b in bins.values()]
  return dict(
    ece=sum(n * abs(f - c) for n, f, c in means) / N,
    brier=sum((f - c) ** 2 for f, c in zip(forecasts, came, strict=True)) / N,
    reliability=sum(n * (f - c) ** 2 for n, f, c in means) / N,
    resolution=sum(n * (c - o) ** 2 for n, _, c in means) / N,
    uncertainty=o * (1 - o),
    forecast=sum(forecasts) / N,
    accuracy=o,
  )


def total(forecasts):
  return {name: float(value) for name, value in measures(*(a.sum(axis=0) for a in forecasts)).items()}


def test_measures_by_hand_and_their_sum():
  forecast_RX, came_RX = RNG.random((7, 9)), RNG.random((7, 9)) < 0.4
  counted_RX = RNG.random((7, 9)) < 0.7
  forecast_RX[0], counted_RX[0] = [0.0, 0.01, 0.02, 0.03, 0.97, 0.98, 0.99, 1.0, 1.0], True  # the last bin is closed
  found = total(Forecasts.of(forecast_RX, came_RX, counted_RX))
  expected = by_hand(forecast_RX[counted_RX].tolist(), came_RX[counted_RX].tolist())
  assert {name: found[name] for name in expected} == pytest.approx(expected)
  pieces = found["reliability"] - found["resolution"] + found["uncertainty"] + found["within"]
  assert found["brier"] == pytest.approx(pieces) and abs(found["within"]) > 1e-4


def test_known_forecasters():
  """One that is right about its certainty, one that always says 0.5, one that is always sure; Murphy's pieces each."""
  came = np.array([[1, 1, 1, 0, 1, 0, 0, 0]])
  everywhere = np.ones(came.shape, bool)
  honest = total(Forecasts.of([[0.75] * 4 + [0.25] * 4], came, everywhere))
  assert (honest["ece"], honest["reliability"], honest["within"]) == pytest.approx((0, 0, 0), abs=1e-12)
  assert honest["resolution"] == pytest.approx(0.0625) and honest["brier"] == pytest.approx(0.25 - 0.0625)
  flat = total(Forecasts.of(np.full(came.shape, 0.5), came, everywhere))
  assert (flat["ece"], flat["resolution"], flat["brier"]) == pytest.approx((0, 0, 0.25), abs=1e-12)
  sure = total(Forecasts.of(np.ones(came.shape), came, everywhere))
  assert (sure["ece"], sure["reliability"], sure["brier"]) == pytest.approx((0.5, 0.25, 0.5))


def test_rows_and_batches_add_up_and_rows_give_the_interval():
  forecast_RX, came_RX, counted_RX = RNG.random((6, 5)), RNG.random((6, 5)) < 0.5, np.ones((6, 5), bool)
  counted_RX[2] = False
  parts = [
    Calibration(dict(softmax=Forecasts.of(*(a[rows] for a in (forecast_RX, came_RX, counted_RX)))), None)
    for rows in (slice(0, 4), slice(4, 6))
  ]
  whole = Calibration(dict(softmax=Forecasts.of(forecast_RX, came_RX, counted_RX)), None)
  together = joined(parts, [np.ones(4, bool), np.ones(2, bool)])
  assert summarise(together) == summarise(whole)
  found = summarise(whole)["forecasters"]["softmax"]
  assert summarise(whole)["forecasts"] == 25 and sum(found["bins"]["count"]) == 25
  assert all(low <= high for _, low, high in (found[name] for name in ("ece", "brier", "accuracy")))
  value, low, high = found["accuracy"]
  error = came_RX[[0, 1, 3, 4, 5]].mean(axis=1).std(ddof=1) / 5**0.5
  assert 0.5 * error < (high - low) / 3.92 < 1.5 * error and low < value < high
  first = joined(parts[:1], [np.array([True, False, False, False])])
  assert summarise(first)["forecasters"]["softmax"]["ece"][1:] == [None, None]
  assert summarise(joined(parts[:1], [np.array([False, False, True, False])])) is None


def test_what_is_said_against_what_would_be_done():
  """Two rows, two anchors, a vocabulary of 4; the second anchor of the second row does not exist."""
  report = Report(
    candidates_BGNI=jnp.array([[[[0, 1], [2, 2]]], [[[3, 0], [1, 1]]]]),
    confidences_BGNI=jnp.array([[[[0.6, 0.2], [0.9, 0.4]]], [[[1.0, 1.0], [0.1, 0.1]]]]),
    actual_BGNI=jnp.array([[[[0.5, 0.3], [0.8, 0.8]]], [[[0.25, 0.25], [0.0, 0.0]]]]),
    target_BN=jnp.array([[0, 3], [0, 0]]),
    weight_BN=jnp.array([[1.0, 2.0], [1.0, 0.0]]),
    anchors_BN=jnp.array([[0, 2], [1, 3]]),
    vocabulary=4,
  )
  top_BT = np.log([[0.5, 1.0, 0.8], [1.0, 0.25, 1.0]])
  hit_BT = np.array([[True, True, False], [True, False, True]])
  found = calibrate(top_BT, hit_BT, np.ones((2, 3), bool), report)
  assert total(found.forecasts["report"]) == pytest.approx(
    by_hand([0.6, 0.4, 0.5], [1, 0, 0]) | dict(within=total(found.forecasts["report"])["within"])
  )
  softmax = by_hand([0.5, 0.8, 0.25], [1, 0, 0])
  assert {name: total(found.forecasts["softmax"])[name] for name in softmax} == pytest.approx(softmax)
  # |0.6 - 0.5|, |0.2 - 0.3|, other |0.2 - 0.2|; |0.4 - 0.8|, other |0.6 - 0.2|; |0.5 - 0.25| twice, other |0 - 0.5|
  np.testing.assert_allclose(found.gap.named_R, [0.1 + 0.4, 0.25], rtol=1e-6)
  np.testing.assert_allclose(found.gap.variation_R, [0.1 + 0.4, 0.5], rtol=1e-6)
  np.testing.assert_array_equal(found.gap.count_R, [2, 1])
  values = summarise(found)["gap"]
  assert values["named"][0] == pytest.approx(0.25) and values["variation"][0] == pytest.approx(1 / 3)


def test_an_evaluation_has_the_calibration_of_its_reference():
  thought = dict(kind="sampled", length=3, report=1, topology="private", samples=2)
  made = make(thought=thought, objective=dict(score_weight=1.0))
  found = run(made, controls=["own"]).calibration
  assert list(found.forecasts) == ["report", "softmax"]
  assert [forecasts.count_RK.sum() for forecasts in found.forecasts.values()] == [13 * 6] * 2
  softmax = found.forecasts["softmax"]
  arm = run(made, controls=["own"]).arms["own"].sums
  plain = run(make(), controls=None)
  np.testing.assert_allclose(softmax.came_RK.sum(axis=1), arm.hits_R)
  assert list(plain.calibration.forecasts) == ["softmax"] and plain.calibration.gap is None
  np.testing.assert_allclose(plain.calibration.forecasts["softmax"].came_RK.sum(axis=1), plain.arms["none"].sums.hits_R)


def test_a_diagram_is_a_picture_and_its_absence_is_said(monkeypatch):
  forecasts = Forecasts.of(RNG.random((4, 9)), RNG.random((4, 9)) < 0.5, np.ones((4, 9), bool))
  values = summarise(Calibration(dict(report=forecasts, softmax=forecasts), None))
  assert diagram.reliability(values, "two forecasters").startswith(b"\x89PNG")
  monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
  assert diagram.reliability(values, "two forecasters") is None and "thinking_lm[report]" in diagram.MISSING
