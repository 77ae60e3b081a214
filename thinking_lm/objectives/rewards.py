"""What a thought is paid: pure functions of the Trace that give reward_BGN. No gradient flows through a reward.

The outcome of a thought is log p(y | x, z) of its look-ahead targets y, weighted by their weights. To add a reward,
write the function and its line in the table.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from thinking_lm.objectives.scores import score


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


def proper_score(trace):
  """How good the thought's report was, by `objective.scoring` (scores.SCORES). Pays for nothing else."""
  return trace.score_BGN


class Reward(NamedTuple):
  """A member of the table.

  of: Trace -> reward_BGN. base: it needs the pass without thoughts (topology private). smooth: it is a differentiable
  function of the outcome, so that a relaxed thought has one too. report: it needs thoughts that report.
  """

  of: Callable
  base: bool = False
  smooth: bool = False
  report: bool = False


REWARDS = dict(
  log_prob=Reward(log_prob, smooth=True),
  info_gain=Reward(info_gain, base=True, smooth=True),
  prob=Reward(prob, smooth=True),
  exact_match=Reward(exact_match),
  proper_score=Reward(proper_score, report=True),
)


def paid(config, trace):
  """reward_BGN of an ObjectiveConfig: its reward, plus calibration_weight x the score of the thought's report, less
  price (in the reward's unit) for every think token that the thought used.

  log_prob with a Brier score is the reward of a thought that says its prediction; exact_match with one is RLCR's
  (arXiv:2507.16806, where the report is one confidence in the model's own answer).
  """
  if trace.report is not None:
    trace = trace.replace(score_BGN=score(config.scoring, trace.report) * trace.report.weight_BN[:, None])
  reward_BGN = REWARDS[config.reward].of(trace)
  if config.calibration_weight:
    reward_BGN += config.calibration_weight * trace.score_BGN
  return reward_BGN - config.price * trace.used_BGN
