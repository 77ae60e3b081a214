"""What an objective carries: there when asked for, moved as a loop in float64 moves it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from thinking_lm.metrics import Mean
from thinking_lm.objectives import carry
from thinking_lm.objectives.baselines import running_mean
from thinking_lm.objectives.objective import ObjectiveConfig

PARAMS = dict(w=jnp.array([1.0, 2.0]), deep=dict(b=jnp.array(3.0)))
SCORE = dict(score_weight=1.0)


@pytest.mark.parametrize(
  "options,names",
  [
    (dict(), []),
    (SCORE, []),
    (dict(advantage="ema"), []),  # without a score term nothing is paid
    (SCORE | dict(advantage="ema"), ["reward_mean"]),
    (SCORE | dict(advantage="value"), ["reward_mean"]),
    (SCORE | dict(advantage="greedy"), []),
    (SCORE | dict(reward="info_gain", teacher_decay=0.9), ["teacher"]),
    (dict(kl_weight=0.1), ["reference"]),
  ],
)
def test_only_what_is_asked_for_is_carried(options, names):
  assert sorted(carry.init(ObjectiveConfig(**options), PARAMS)) == names


def rewards(total, count):
  return dict(reward=Mean(jnp.float32(total), jnp.float32(count)))


def test_the_running_mean_is_bias_corrected_and_skips_batches_without_a_reward():
  config = ObjectiveConfig(**SCORE, advantage="ema", baseline_decay=0.8)
  extra, means = carry.init(config, PARAMS), []
  assert float(running_mean(config, None, None, extra)) == 0
  for total, count in ((-6.0, 3.0), (0.0, 0.0), (-10.0, 2.0), (4.0, 4.0)):
    extra = carry.update(config, extra, PARAMS, rewards(total, count), jnp.int32(0))
    if count:
      means.append(total / count)
    weights = [0.8**age for age in range(len(means))][::-1]
    expected = np.dot(weights, means) / sum(weights)
    np.testing.assert_allclose(running_mean(config, None, None, extra), expected, rtol=1e-6)


def test_a_teacher_follows_and_a_reference_stays():
  config = ObjectiveConfig(**SCORE, reward="info_gain", teacher_decay=0.75, kl_weight=0.1)
  extra = carry.init(config, PARAMS)
  follower = jax.tree.map(np.asarray, PARAMS)
  for step in range(3):
    moved = jax.tree.map(lambda p, s=step: p + s + 1, PARAMS)
    extra = carry.update(config, extra, moved, rewards(1, 1), jnp.int32(step))
    follower = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, follower, moved)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), extra["teacher"], follower)
  jax.tree.map(np.testing.assert_array_equal, extra["reference"], PARAMS)
