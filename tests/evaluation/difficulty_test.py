"""Think tokens against difficulty: ranks by counting, and the table of an evaluated task."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.evaluation import harness
from thinking_lm.evaluation.difficulty import Difficulty, ranks, spearman, summarise
from thinking_lm.evaluation.summary import summarise as summary_of
from thinking_lm.evaluation.summary import table


def test_ranks_and_their_correlation_by_counting():
  rng = np.random.default_rng(0)
  a_R, b_R = rng.integers(4, size=50), rng.integers(9, size=50)
  by_hand = lambda x_R: np.array([np.sum(x_R < x) + (np.sum(x_R == x) + 1) / 2 for x in x_R])
  np.testing.assert_allclose(ranks(a_R), by_hand(a_R))
  assert spearman(a_R, b_R) == pytest.approx(np.corrcoef(by_hand(a_R), by_hand(b_R))[0, 1])
  assert spearman(a_R, np.exp(a_R)) == pytest.approx(1) and spearman(a_R, -a_R) == pytest.approx(-1)
  assert spearman(a_R, np.ones(50)) is None


def test_longer_thoughts_about_harder_examples_are_a_correlation_with_an_interval():
  rng = np.random.default_rng(1)
  level_R = rng.integers(1, 4, size=300).astype(float)
  column = lambda x_R: np.asarray(x_R, float)[:, None]
  found = summarise(Difficulty(column(level_R), column(level_R + rng.normal(size=300)), column(level_R < 3)))
  value, low, high = found["correlation"]
  assert 0.4 < low < value < high < 0.8
  assert [one["level"] for one in found["levels"]] == [1, 2, 3]
  assert sum(one["answers"] for one in found["levels"]) == 300
  assert [one["accuracy"][0] for one in found["levels"]] == [1, 1, 0]
  still = column(np.zeros(300))
  assert summarise(Difficulty(column(level_R), still, still))["correlation"] == [None, None, None]


def test_labels_of_a_row_count_one_by_one_and_are_resampled_together():
  """Labels of a row that say the same make no interval narrower, however many they are. NaN is no label."""
  rng = np.random.default_rng(2)
  level_R, noise_R = rng.integers(1, 4, size=60).astype(float), rng.normal(size=60)
  wide = lambda x_R, times: np.repeat(x_R[:, None], times, axis=1)
  of = lambda times, pad: summarise(
    Difficulty(
      *(np.pad(wide(x_R, times), ((0, 0), (0, pad)), constant_values=np.nan) for x_R in (level_R, level_R + noise_R)),
      np.pad(wide((level_R < 3).astype(float), times), ((0, 0), (0, pad))),
    )
  )
  one, three = of(1, 0), of(3, 2)
  np.testing.assert_allclose(three["correlation"], one["correlation"], atol=1e-12)
  assert [level["answers"] for level in three["levels"]] == [3 * level["answers"] for level in one["levels"]]
  assert [level["accuracy"][0] for level in three["levels"]] == [level["accuracy"][0] for level in one["levels"]]


def test_an_evaluated_task_is_told_by_difficulty():
  thought = dict(kind="latent", length=3, topology="private", placement="answer", halting="ponder", stop_at=0.8)
  made = harness.make(task=dict(name="parity", length=4), thought=thought)
  found = harness.run(made, controls=("none",))
  values = summary_of(found, tagging=False, task=True)
  prompts = [example.prompt.decode() for example in made[0].data.examples("validation", 13)]
  signs = [prompt.count("+") + prompt.count("-") for prompt in prompts]
  assert found.difficulty.level_RU[:, 0].tolist() == signs and len(set(signs)) > 1
  subject, params, _ = made
  for number, host in enumerate(subject.data.evaluation_batches("validation", batch_size=4)):
    used_B = subject.rollout(params, jax.tree.map(jnp.asarray, host), harness.KEY).used_BGN.sum(axis=(1, 2))
    rows = slice(4 * number, 4 * number + 4)
    used_R = found.difficulty.used_RU[rows, 0]
    np.testing.assert_array_equal(used_R, used_B[: len(used_R)])
  assert found.difficulty.used_RU.sum() == found.think_tokens > 0
  np.testing.assert_array_equal(found.difficulty.right_RU[:, 0], found.arms["own"].sums.whole_R)
  assert {one["level"] for one in values["difficulty"]["levels"]} == set(signs)
  assert "rank correlation of think tokens with difficulty" in table(values)
  none = harness.run(harness.make(task=dict(name="parity", length=4), thought=dict(length=0)))
  assert none.difficulty is None and "difficulty" not in table(summary_of(none, tagging=False, task=True))


def test_the_labels_of_a_row_are_told_by_how_many_elements_they_take():
  """Thoughts after every second element, which a head ends where it says so; the others took none."""
  thought = dict(
    kind="latent", length=3, topology="private", placement="stride", stride=2, halting="ponder", stop_at=0.8
  )
  subject, params, _ = made = harness.make(thought=thought)
  found = harness.run(made, controls=("none",)).difficulty
  np.testing.assert_array_equal(found.level_RU, np.broadcast_to(np.arange(1, 7), (13, 6)))
  host = next(subject.data.evaluation_batches("validation", batch_size=13))
  trace = subject.rollout(params, jax.tree.map(jnp.asarray, host), harness.KEY)
  assert trace.used_BGN.any()
  np.testing.assert_array_equal(found.used_RU[:, 1::2], trace.used_BGN[:, 0])
  assert not found.used_RU[:, ::2].any()
  np.testing.assert_array_equal(found.right_RU, trace.hit_BGT[:, 0])
