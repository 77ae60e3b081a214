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
  found = summarise(Difficulty(level_R, level_R + rng.normal(size=300), (level_R < 3).astype(float)))
  value, low, high = found["correlation"]
  assert 0.4 < low < value < high < 0.8
  assert [one["level"] for one in found["levels"]] == [1, 2, 3] and sum(one["rows"] for one in found["levels"]) == 300
  assert [one["accuracy"][0] for one in found["levels"]] == [1, 1, 0]
  assert summarise(Difficulty(level_R, np.zeros(300), np.zeros(300)))["correlation"] == [None, None, None]


def test_an_evaluated_task_is_told_by_difficulty():
  thought = dict(kind="latent", length=3, topology="private", placement="answer", halting="ponder", stop_at=0.8)
  made = harness.make(task=dict(name="parity", length=4), thought=thought)
  found = harness.run(made, controls=("none",))
  values = summary_of(found, tagging=False, task=True)
  prompts = [example.prompt.decode() for example in made[0].data.examples("validation", 13)]
  signs = [prompt.count("+") + prompt.count("-") for prompt in prompts]
  assert found.difficulty.level_R.tolist() == signs and len(set(signs)) > 1
  subject, params, _ = made
  for number, host in enumerate(subject.data.evaluation_batches("validation", batch_size=4)):
    used_B = subject.rollout(params, jax.tree.map(jnp.asarray, host), harness.KEY).used_BGN.sum(axis=(1, 2))
    rows = slice(4 * number, 4 * number + 4)
    used_R = found.difficulty.used_R[rows]
    np.testing.assert_array_equal(used_R, used_B[: len(used_R)])
  assert found.difficulty.used_R.sum() == found.think_tokens > 0
  np.testing.assert_array_equal(found.difficulty.right_R, found.arms["own"].sums.whole_R)
  assert {one["level"] for one in values["difficulty"]["levels"]} == set(signs)
  assert "rank correlation of think tokens with difficulty" in table(values)
  none = harness.run(harness.make(task=dict(name="parity", length=4), thought=dict(length=0)))
  assert none.difficulty is None and "difficulty" not in table(summary_of(none, tagging=False, task=True))
