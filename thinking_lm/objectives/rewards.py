"""What a thought is paid: pure functions of the Trace that give reward_BGN. No gradient flows through a reward.

The outcome of a thought is log p(y | x, z) of its look-ahead targets y, weighted by their weights. To add a reward,
write the function and its line in the table.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp


def log_prob(trace):
  """log p(y | x, z): what perplexity pays for. Nats, <= 0. Its expectation is J."""
  return trace.outcome_BGN


def info_gain(trace):
  """log p(y | x, z) - log p(y | x), the latter by the same model without the thought. Nats.

  The same for every sample of a group, the second term cancels in every advantage with a group baseline; and it rises
  when the model gets worse without thoughts, so that nll and nll_base belong beside it.
  """
  return trace.outcome_BGN - trace.base_outcome_BN[:, None]


def prob(trace):
  """p(y | x, z), in [0, 1]. Its expectation is P. Next to nothing for long y, whatever the thought."""
  return jnp.exp(trace.outcome_BGN)


def exact_match(trace):
  """1 if every target of y with a weight is the model's most likely token (given those before it), else 0."""
  return trace.outcome_hit_BGN.astype(jnp.float32)


class Reward(NamedTuple):
  """A member of the table.

  of: Trace -> reward_BGN. base: it needs the pass without thoughts (topology private). smooth: it is a differentiable
  function of the outcome, so that a relaxed thought has one too.
  """

  of: Callable
  base: bool = False
  smooth: bool = False


REWARDS = dict(
  log_prob=Reward(log_prob, smooth=True),
  info_gain=Reward(info_gain, base=True, smooth=True),
  prob=Reward(prob, smooth=True),
  exact_match=Reward(exact_match),
)


def paid(name: str, price: float, trace):
  """reward_BGN of `name`, less `price` (in its unit) for every think token that the thought used."""
  return REWARDS[name].of(trace) - price * trace.used_BGN
