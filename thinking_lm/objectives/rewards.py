"""What a thought is paid: pure functions of the Trace that give reward_BGN. No gradient flows through a reward.

The outcome of a thought is log p(y | x, z) of its look-ahead targets y, weighted by their weights. To add a reward,
write the function and its line in the table.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from thinking_lm.data.tokenizer import SPACE
from thinking_lm.objectives.scores import score
from thinking_lm.types import BORDER


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


def prefix_match(trace):
  """1 if the codes of the sampled answer begin what really came and end where one of its tokens does, else 0.

  The reward of RPT (arXiv:2506.08007, section 3): byte by byte, so that the cut into tokens does not count, but never
  half a token. 0 where the anchor's target has no weight, and for answers of no bytes.
  """
  answer = trace.answer
  said_BGNP, came_BGNP = answer.said_BGNP, answer.came_BNP[:, None]
  length_BGN1 = jnp.sum(said_BGNP >= 0, axis=-1, keepdims=True)
  same_BGN = jnp.all((said_BGNP == came_BGNP) | (said_BGNP < 0), axis=-1)
  whole_BGN = jnp.any(answer.ends_BNP[:, None] == length_BGN1, axis=-1) & (length_BGN1[..., 0] > 0)
  return (same_BGN & whole_BGN & (answer.weight_BN > 0)[:, None]).astype(jnp.float32)


WHITE = (*SPACE, BORDER)
"""Codes around an answer that the tasks' verifiers do not look at."""


def verifier(trace):
  """1 if the sampled answer is the one that the task asks for, but for white space around either, else 0.

  This is what the verifiers of data.tasks say of a single answer (of text, or one label), on arrays: what is asked for
  comes with the rows, as their targets. A border that was drawn ends the answer and need not be there. 0 where the
  anchor's target has no weight.
  """
  answer = trace.answer
  same_BGN = jnp.all(_stripped(answer.said_BGNP) == _stripped(answer.asked_BNP)[:, None], axis=-1)
  return (same_BGN & (answer.weight_BN > 0)[:, None]).astype(jnp.float32)


def _stripped(codes_XP):
  """Codes without those of WHITE at either side, from the first place on; -1 behind them."""
  room = codes_XP.shape[-1]
  place_P = jnp.arange(room)
  ink_XP = (codes_XP >= 0) & jnp.all(codes_XP[..., None] != jnp.array(WHITE), axis=-1)
  first_X1 = jnp.min(jnp.where(ink_XP, place_P, room), axis=-1, keepdims=True)
  last_X1 = jnp.max(jnp.where(ink_XP, place_P, -1), axis=-1, keepdims=True)
  moved_XP = jnp.take_along_axis(codes_XP, jnp.minimum(place_P + first_X1, room - 1), axis=-1)
  return jnp.where(place_P <= last_X1 - first_X1, moved_XP, -1)


class Reward(NamedTuple):
  """A member of the table.

  of: Trace -> reward_BGN. base: it compares with a pass without thoughts. smooth: it is a differentiable
  function of the outcome, so that a relaxed thought has one too. report: it needs thoughts that report. answer: it
  needs thoughts that answer. task: and a task, whose answers can be right.
  """

  of: Callable
  base: bool = False
  smooth: bool = False
  report: bool = False
  answer: bool = False
  task: bool = False


REWARDS = dict(
  log_prob=Reward(log_prob, smooth=True),
  info_gain=Reward(info_gain, base=True, smooth=True),
  prob=Reward(prob, smooth=True),
  exact_match=Reward(exact_match),
  proper_score=Reward(proper_score, report=True),
  prefix_match=Reward(prefix_match, answer=True),
  verifier=Reward(verifier, answer=True, task=True),
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
