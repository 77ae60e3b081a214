"""The passes beside a rollout that an objective asks for: one without thoughts, a greedy one, the reference's."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from thinking_lm.model.rollout import actions
from thinking_lm.objectives.advantages import ADVANTAGES
from thinking_lm.objectives.baselines import BASELINES, compares, reward_of
from thinking_lm.thoughts.topology import rest
from thinking_lm.types import Batch, Beside, Layout, Params, Thoughts


def passes(
  subject, params: Params, batch: Batch, key, extra: Mapping[str, Any], layout: Layout, thoughts: Thoughts
) -> Beside:
  """What they tell of rows in which `thoughts` were drawn at the anchors of `layout`; none of it has a gradient.

  Args:
    subject: an `experiment.Experiment`. params: those that drew. extra: what the objective carries (carry.py).
  """
  goal, thought, beside = subject.config.objective, subject.config.thought, Beside()
  params, extra = jax.lax.stop_gradient((params, extra))
  if compares(goal, thought):
    plain = subject.rollout(extra.get("teacher", params), batch, key, thought=dataclasses.replace(thought, length=0))
    inside_BNT = rest(batch, layout, thought.lookahead)
    outcome_BN = jnp.sum(inside_BNT * (plain.logp_BGT * batch.weights_BT[:, None]), axis=-1)
    beside = beside.replace(plain_logp_BT=plain.logp_BGT[:, 0], plain_outcome_BN=outcome_BN)
  baseline = ADVANTAGES[goal.advantage].baseline
  if goal.score_weight and baseline and BASELINES[baseline].greedy:
    one = dataclasses.replace(thought, temperature=0.0, samples=1)
    greedy = subject.rollout(params, batch, key, thought=one, layout=layout)
    beside = beside.replace(greedy_reward_BN=reward_of(goal, greedy, beside)[:, 0])
  if "reference" in extra:
    given = actions(subject.model.bind(extra["reference"]), thought, thoughts)
    policy = subject.rollout(extra["reference"], batch, key, given, layout=layout)
    beside = beside.replace(reference_logp_BGNJ=policy.token_logp_BGNJ)
  return jax.lax.stop_gradient(beside)
