"""What a thought is expected to be paid, by what is known without looking at it: baselines from outside the group.

Each is a pure function (config, trace, beside, extra) -> baseline_BGN, or what broadcasts to it, without gradient. An
advantage names the one it subtracts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from thinking_lm.objectives import exits
from thinking_lm.objectives.bounds import BOUNDS
from thinking_lm.objectives.rewards import REWARDS, paid


def compares(goal, thought) -> bool:
  """Whether a pass without thoughts stands beside, that the reward compares with: by a teacher, or by the same model
  where thoughts stay in context and the rollout predicts nothing without them.
  """
  same = goal.score_weight and REWARDS[goal.reward].base and thought.length and thought.topology == "persistent"
  return bool(goal.teacher_decay or same)


def reward_of(config, trace, beside):
  """reward_BGN of a trace as the config pays it: by its bound, against a pass beside it if any, less what it costs."""
  credited = exits.settled(BOUNDS[config.bound].credit(jax.lax.stop_gradient(trace)))
  if beside.plain_outcome_BN is not None:
    credited = credited.replace(base_outcome_BN=beside.plain_outcome_BN)
  reward_BGN = paid(config, credited)
  if config.halt_weight:
    reward_BGN -= config.halt_weight * exits.divergence(credited, config.halt_prior)
  return reward_BGN


def running_mean(config, trace, beside, extra):
  """The mean reward of earlier steps (carry.py), one number, 0 before the first: it knows no thought of this."""
  del config, trace, beside
  mean = extra["reward_mean"]
  return jnp.where(mean["weight"] > 0, mean["total"] / jnp.maximum(mean["weight"], 1e-30), 0.0)


def value(config, trace, beside, extra):
  """What the value head reads off each anchor; earlier thoughts of a persistent stream are part of what it sees."""
  del config, beside, extra
  return jax.lax.stop_gradient(trace.value_BGN)


def greedy(config, trace, beside, extra):
  """The reward of the thoughts that the same model has when each token is its most likely one."""
  del config, trace, extra
  return beside.greedy_reward_BN[:, None]


class Baseline(NamedTuple):
  """A member of the table. head: the head that it reads, if any. mean: it needs the running mean of rewards (the value
  head does, to be compared with). greedy: it needs a greedy rollout.
  """

  of: Callable
  head: str | None = None
  mean: bool = False
  greedy: bool = False


BASELINES = dict(
  running_mean=Baseline(running_mean, mean=True),
  value=Baseline(value, head="value", mean=True),
  greedy=Baseline(greedy, greedy=True),
)
