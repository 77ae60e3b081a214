"""The estimators under the microscope: each a few options of a config, put over a run's own thoughts.

Where a thought goes, what sees it, how long it is and its temperature stay the run's; how its gradient is estimated is
the estimator's, and every option of the objective that it does not name is at its default.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from thinking_lm.errors import ConfigError
from thinking_lm.objectives.objective import ObjectiveConfig, estimating
from thinking_lm.types import Params

SCORE = {"objective.score_weight": 1.0}

ESTIMATORS: dict[str, dict[str, Any] | None] = dict(
  own=None,
  hybrid=SCORE,
  reinforce=SCORE | {"objective.advantage": "none"},
  nll_only={},
  score_only=SCORE | {"objective.nll_weight": 0.0},
  mean=SCORE | {"objective.advantage": "mean"},
  rlp=SCORE | {"objective.nll_weight": 0.0, "objective.advantage": "rlp"},
  quiet_star=SCORE | {"objective.advantage": "quiet_star"},
  grpo=SCORE | {"objective.advantage": "grpo"},
  dr_grpo=SCORE | {"objective.advantage": "dr_grpo"},
  dapo=SCORE | {"objective.nll_weight": 0.0, "objective.advantage": "dapo"},
  ema=SCORE | {"objective.advantage": "ema"},
  value=SCORE | {"objective.advantage": "value"},
  greedy=SCORE | {"objective.advantage": "greedy"},
  vimco=SCORE | {"objective.bound": "M", "objective.advantage": "vimco"},
  jepo=SCORE | {"objective.bound": "M", "objective.advantage": "jepo"},
  verifree=SCORE | {"objective.bound": "P", "objective.reward": "prob"},
  gumbel={"thought.kind": "gumbel"},
  noisy=SCORE | {"thought.kind": "noisy"},
  rebar=SCORE | {"objective.control": 0.4, "thought.relaxation": 2.0},
  relax=SCORE | {"objective.control": 1.0, "objective.variate": "relax", "thought.relaxation": 0.5},
  exact={"objective.exact": True},
)
"""name -> what it sets; None: nothing.

own: the run's objective and thoughts as they stand, if these are drawn, with its own number of samples; the first of
several updates.
hybrid: both terms of grad J, leave-one-out. reinforce: the same without a baseline. nll_only, score_only: one term of
it. mean, grpo, dr_grpo, ema, value, greedy: hybrid with another baseline or scale; ema takes the running mean of
rewards that the run carries, and without one is reinforce. quiet_star: its clamp, with the NLL term. rlp, dapo: score
terms alone (rlp has the numbers of score_only). vimco, jepo: both terms of bound M. verifree: of bound P. gumbel:
straight-through. noisy: hybrid over mixtures with noise, whose J is one of its own. rebar, relax: hybrid with a control
variate through the relaxed sample, or of a head. exact: grad J summed over every thought: what the others estimate.
"""

REFERENCES = dict(
  J={"objective.exact": True},
  M={"objective.exact": True, "objective.bound": "M"},
  P={"objective.exact": True, "objective.bound": "P"},
)
"""What is compared with, where every thought can be enumerated."""

SAMPLED_REFERENCES = dict(J=ESTIMATORS["hybrid"], M=ESTIMATORS["jepo"], P=ESTIMATORS["verifree"])
"""What is compared with elsewhere, with many samples; that of M has a bias of its own, of order 1 / samples."""


def settings(changes: dict[str, Any] | None, thought, samples: int) -> dict[str, Any]:
  """Every option that an estimator sets, over a run with this ThoughtConfig, as a flat dict.

  Rows are drawn and looked at once, however many updates the run makes on them.
  Persistent thoughts are paid by the rest of their document, whatever look-ahead they were trained with: with a shorter
  one no estimator is one of J.

  Raises ConfigError: the run's own thoughts are asked for, and they are not drawn.
  """
  once = {"train.updates": 1}
  if changes is None:
    if not thought.kind_of.stochastic:
      raise ConfigError(
        f"the run's own thoughts ({thought.kind}) are not drawn: their gradient has no noise, and is none of these"
      )
    return once
  found = once | {f"objective.{field.name}": field.default for field in dataclasses.fields(ObjectiveConfig)}
  found |= {
    **{"thought.kind": "sampled", "thought.relaxation": 0.0, "thought.top_k": 0, "thought.rescore": True},
    **{"thought.temperature_end": 0.0, "thought.temperature_steps": 0, "thought.answer": 0},
    **{"thought.iterations": 0, "thought.through": 0},
    **{"thought.temperature": thought.temperature or 1.0},
  }
  if thought.topology == "persistent":
    found["thought.lookahead"] = 0
  found |= changes
  return found | {"thought.samples": 1 if found["objective.exact"] else samples}


def goal(name: str) -> ObjectiveConfig:
  """The objective of a member of ESTIMATORS."""
  options = {key.partition(".")[2]: value for key, value in ESTIMATORS[name].items() if key.startswith("objective.")}
  return ObjectiveConfig(**options)


def read(params: Params, heads: Collection[str]) -> Params:
  """What a model with these heads alone reads of the parameters of one that may have more, as of `estimating`."""
  body, there = {name: leaf for name, leaf in params.items() if name != "heads"}, params.get("heads", {})
  kept = {name: there[name] for name in heads}
  return estimating(body | (dict(heads=kept) if kept else {}))
