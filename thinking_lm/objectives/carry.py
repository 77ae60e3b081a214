"""What an objective carries from step to step, in TrainState.extra: pure functions of config, parameters and metrics.

reward_mean: running mean of the rewards of earlier steps, `total` / `weight` (bias-corrected: weight starts at 0).
teacher: moving average of the parameters, which predicts without thoughts for the reward info_gain.
reference: a copy of the parameters that never moves, to which the policy is held.

Each is there only if the config asks for it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from thinking_lm.metrics import Mean
from thinking_lm.objectives.advantages import ADVANTAGES
from thinking_lm.objectives.baselines import BASELINES
from thinking_lm.types import Params


def init(config, params: Params) -> dict[str, Any]:
  """Before the first step: no reward seen yet, teacher and reference equal to the parameters."""
  extra, baseline = {}, ADVANTAGES[config.advantage].baseline
  if config.score_weight and baseline and BASELINES[baseline].mean:
    extra["reward_mean"] = dict(total=jnp.zeros(()), weight=jnp.zeros(()))
  if config.teacher_decay:
    extra["teacher"] = jax.tree.map(jnp.copy, params)
  if config.kl_weight:
    extra["reference"] = jax.tree.map(jnp.copy, params)
  return extra


def update(config, extra: dict[str, Any], params: Params, metrics: dict[str, Mean], step) -> dict[str, Any]:
  """After an update: `params` are the new ones, `metrics` sums over the global batch. A batch without thoughts has no
  reward and leaves the mean alone.
  """
  del step
  moved = dict(extra)
  if "reward_mean" in extra:
    keep, reward = config.baseline_decay, metrics["reward"]
    share = jnp.where(reward.count > 0, 1 - keep, 0.0)
    new = dict(total=reward.total / jnp.maximum(reward.count, 1.0), weight=jnp.ones(()))
    moved["reward_mean"] = jax.tree.map(lambda old, now: (1 - share) * old + share * now, extra["reward_mean"], new)
  if "teacher" in extra:
    keep = config.teacher_decay
    moved["teacher"] = jax.tree.map(lambda old, now: keep * old + (1 - keep) * now, extra["teacher"], params)
  return moved
