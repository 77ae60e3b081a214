import math

import numpy as np
import pytest

from thinking_lm.evaluation.intervals import Z, over_runs, ratio, share, wilson


def test_equal_counts_give_the_interval_of_a_mean():
  x = np.random.default_rng(0).normal(size=40)
  found = ratio(3 * x, np.full(40, 3.0))
  half = Z * x.std(ddof=1) / math.sqrt(40)
  np.testing.assert_allclose(found, [x.mean(), x.mean() - half, x.mean() + half], rtol=1e-12)


def test_a_ratio_has_the_spread_of_its_linearisation():
  total, count = np.array([1.0, 2.0, 6.0]), np.array([1.0, 1.0, 2.0])
  error = math.sqrt(3 / 2 * ((1 - 9 / 4) ** 2 + (2 - 9 / 4) ** 2 + (6 - 9 / 2) ** 2)) / 4
  np.testing.assert_allclose(ratio(total, count), [9 / 4, 9 / 4 - Z * error, 9 / 4 + Z * error], rtol=1e-12)


def test_a_paired_difference_does_not_see_what_both_share():
  shared, gain = np.random.default_rng(0).normal(size=30) * 100, 0.5
  found = ratio((shared + gain) - shared, np.ones(30))
  assert found.value == pytest.approx(gain) and found.high - found.low < 1e-10


def test_one_row_tells_no_spread_and_no_row_tells_nothing():
  assert ratio([2.0], [4.0]) == (0.5, None, None)
  assert ratio([], []) is None and ratio([0.0], [0.0]) is None and share([0], [0]) is None


def test_wilson_at_the_ends_and_in_the_middle():
  assert wilson(1.0, 20).low == pytest.approx(20 / (20 + Z**2))
  assert wilson(1.0, 20).high == 1.0 and wilson(0.0, 20).low == 0.0
  assert wilson(0.0, 20).high == pytest.approx(Z**2 / (20 + Z**2))
  for end in wilson(0.3, 50)[1:]:  # both ends p solve |0.3 - p| = Z sqrt(p (1 - p) / n)
    assert abs(0.3 - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / 50))


def test_one_label_a_row_is_wilsons_interval():
  hits = np.array([1.0] * 13 + [0.0] * 7)
  assert share(hits, np.ones(20)) == pytest.approx(wilson(13 / 20, 20))


def test_labels_that_go_together_are_worth_their_rows():
  hits = np.array([10.0] * 13 + [0.0] * 7)
  assert share(hits, np.full(20, 10.0)) == pytest.approx(wilson(13 / 20, 20))
  assert share(np.full(20, 10.0), np.full(20, 10.0)) == pytest.approx(wilson(1.0, 20))


def test_independent_labels_are_worth_about_their_number():
  hits = np.random.default_rng(0).binomial(10, 0.4, size=4000).astype(float)
  found = share(hits, np.full(4000, 10.0))
  wanted = wilson(found.value, 40000)
  assert found.high - found.low == pytest.approx(wanted.high - wanted.low, rel=0.05)


def test_about_19_of_20_intervals_hold_the_truth():
  random = np.random.default_rng(0)
  held = 0
  for _ in range(400):
    p = random.beta(2, 2, size=60)  # rows differ
    counts = random.integers(1, 9, size=60)
    found = share(random.binomial(counts, p), counts)
    held += found.low <= 0.5 <= found.high
  assert 0.92 <= held / 400 <= 0.98


def test_student_intervals_over_runs():
  """Quantiles of the printed tables, below and above where they are kept."""
  for n, t in ((2, 12.706), (3, 4.303), (10, 2.262), (11, 2.228), (21, 2.086), (121, 1.980)):
    values = np.arange(n) % 2 + np.arange(n) / n
    found = over_runs(values)
    assert found.value == pytest.approx(values.mean())
    error = values.std(ddof=1) / np.sqrt(n)
    assert (found.high - found.value) / error == pytest.approx(t, abs=5e-3)
    assert found.value - found.low == pytest.approx(found.high - found.value)
  assert over_runs([2.0]) == (2.0, None, None)
