import json
import math

import numpy as np
import pytest

from thinking_lm.evaluation.calibration import Calibration, Forecasts
from thinking_lm.evaluation.draws import Draws
from thinking_lm.evaluation.evaluators import Arm, Evaluation, RowSums
from thinking_lm.evaluation.intervals import ratio, wilson
from thinking_lm.evaluation.summary import file_name, summarise, table


def sums(nats, count, hits):
  count = np.asarray(count, np.float64)
  hits = np.asarray(hits, np.float64)
  return RowSums(np.asarray(nats, np.float64), count, 2 * count, hits, count, ((hits == count) & (count > 0)) * 1.0)


OWN = sums([1.0, 2.0, 4.0], [2, 2, 2], [2, 1, 0])
OWN_THERE = sums([0.0, 2.0, 4.0], [0, 2, 2], [0, 1, 0])
OTHER = sums([0.0, 3.0, 9.0], [0, 2, 2], [0, 0, 0])
NONE = sums([2.0, 3.0, np.nan], [2, 2, 2], [0, 0, 0])


def evaluation(**changes):
  T = np.array([2, 0]), np.array([3, 0])
  fields = dict(
    split="test",
    ids_R=np.arange(3),
    arms=dict(own=Arm(OWN, OWN, 6, *T), shuffled=Arm(OTHER, OWN_THERE, 4, *T), none=Arm(NONE, OWN, 0, *T)),
    draws={4: Draws(np.array([0.5, 1.0, 2.0]), np.array([1.0, 2.0, 4.0]))},
    omitted=dict(moved="no thought has a donor"),
    calibration=Calibration(dict(softmax=Forecasts.of(np.full((3, 2), 0.5), np.eye(3, 2), np.ones((3, 2)))), None),
    generated=np.array([1.0, 0.0, 0.5, 1.0]),
    anchors=6,
    real_tokens=6,
    think_tokens=12,
    dropped=0,
    residual=None,
    difficulty=None,
    seconds=dict(own=(1.0, 0.5)),
  )
  return Evaluation(**(fields | changes))


def test_means_and_paired_differences_are_over_the_rows_that_count():
  found = summarise(evaluation(), tagging=True, task=True)
  own, other = found["arms"]["own"], found["arms"]["shuffled"]
  assert own["nats_per_token"] == pytest.approx(list(ratio([1, 2, 4], [2, 2, 2])))
  assert own["bits_per_byte"][0] == pytest.approx(7 / 12 / math.log(2))
  assert other["nats_per_token"] == pytest.approx(list(ratio([3, 9], [2, 2])))
  assert other["minus_reference"] == pytest.approx(list(ratio([1, 5], [2, 2])))
  assert other["minus_reference_bits_per_byte"][0] == pytest.approx(6 / 8 / math.log(2))
  assert own["accuracy"][0] == 0.5 and other["accuracy"][0] == 0.0 and other["accuracy_of_reference"][0] == 0.25
  assert own["whole_examples"] == pytest.approx(list(wilson(1 / 3, 3)))
  assert other["whole_examples"] == pytest.approx(list(wilson(0, 2)))
  assert (other["rows"], other["targets"], other["targets_excluded"], other["thoughts_changed"]) == (2, 4, 2, 4)
  assert found["positions"]["own"] == [pytest.approx(2 / 3), None]
  assert found["generated"]["score"][0] == 0.625 and found["generated"]["whole_examples"][0] == 0.5


def test_draws_are_compared_with_none():
  arms = evaluation().arms
  arms["none"] = Arm(OTHER._replace(nats_R=np.array([2.0, 3.0, 5.0]), count_R=OWN.count_R), OWN, 0, *arms["own"][3:])
  draws = summarise(evaluation(arms=arms), tagging=False, task=False)["draws"]["4"]
  assert draws["nats_per_token"][0] == pytest.approx(3.5 / 6)
  assert draws["expected_nats_per_token"][0] == pytest.approx(7 / 6)
  assert draws["minus_none"] == pytest.approx(list(ratio([-1.5, -2, -3], [2, 2, 2])))
  del arms["none"]
  assert summarise(evaluation(arms=arms), tagging=False, task=False)["draws"]["4"]["minus_none"] is None


def test_what_is_not_finite_or_not_there_is_null():
  found = summarise(evaluation(generated=None), tagging=False, task=False)
  json.dumps(found, allow_nan=False)
  assert found["arms"]["none"]["nats_per_token"] == [None, None, None]
  assert found["positions"] is None and found["generated"] is None and found["arms"]["own"]["whole_examples"] is None


def test_the_table_is_aligned_and_says_everything():
  text = table(summarise(evaluation(), tagging=True, task=True), positions=True)
  lines = text.split("\n")
  heads = lines[0]
  shuffled = next(line for line in lines if line.startswith("shuffled"))
  assert shuffled[heads.index("nats/token") :].startswith("3.0000 [0.0601, 5.9399]")
  assert shuffled[heads.index("minus own") :].startswith("1.5000 [")
  assert next(line for line in lines if line.startswith("none"))[heads.index("nats/token") :].startswith("not finite")
  assert next(line for line in lines if line.startswith("own"))[heads.index("minus own")] == "-"
  assert next(line for line in lines if line.startswith("softmax")).split()[1] == "0.1667"
  assert "K = 4" in text and "accuracy at" in text and "answers" in text
  assert lines[-1] == "moved left out: no thought has a donor"
  crowded = table(summarise(evaluation(dropped=2), tagging=True, task=True))
  assert crowded.endswith("2 thoughts found no room in their rows and are left out: see thought.room")
  assert (
    table(summarise(evaluation(residual=0.25), tagging=True, task=True)).splitlines()[-1].startswith("residual 2.50")
  )
  assert "accuracy at" not in table(summarise(evaluation(), tagging=True, task=True))


def test_results_on_other_data_do_not_replace_those_on_the_runs_own():
  assert file_name("test", 3, False, "ab" * 32, "ab" * 32) == "test-3"
  assert file_name("test", 3, True, "ab" * 32, "cd" * 32) == "test-3-averaged-data-abababab"
