"""What the sections of a config ask of one another: combinations that mean nothing, and parts that only some need.

Rules within a section stand in its `faults()`. All of this is looked at before anything is allocated.
"""

from thinking_lm.data.tasks import TAGGING
from thinking_lm.objectives.advantages import ADVANTAGES
from thinking_lm.objectives.baselines import BASELINES
from thinking_lm.objectives.objective import ObjectiveConfig
from thinking_lm.objectives.rewards import REWARDS
from thinking_lm.objectives.variates import VARIATES
from thinking_lm.thoughts import enumeration
from thinking_lm.thoughts.halting import HALTING
from thinking_lm.thoughts.placement import PLACEMENTS, capacity
from thinking_lm.thoughts.spec import ThoughtConfig


def heads(thought: ThoughtConfig, goal: ObjectiveConfig, data) -> tuple[str, ...]:
  """The members of model.heads.HEADS that these sections need: no others exist as parameters."""
  verdict = ("verdict",) if data.source == "verdicts" and data.verdicts.label else ()
  if not thought.length:
    return verdict
  baseline = ADVANTAGES[goal.advantage].baseline if goal.score_weight else None
  variate = goal.score_weight and goal.control and VARIATES[goal.variate].head
  wanted = (
    *(HALTING[thought.halting].head, thought.mixing != "none" and "mix"),
    *(baseline and BASELINES[baseline].head, variate),
  )
  return verdict + tuple(name for name in wanted if name)


def head_faults(thought: ThoughtConfig, goal: ObjectiveConfig, data, model) -> list[str]:
  """What a trained model has no head for; data: the config section."""
  missing = sorted(set(heads(thought, goal, data)) - set(model.heads))
  what = "these thoughts and this objective need heads that this run has not trained"
  return [f"{what}: {', '.join(missing)}"] if missing else []


def room_faults(thought: ThoughtConfig, T: int, aligned: int) -> list[str]:
  """Rows of T tokens (0: as long as the data's; aligned: see `placement.place`) into which not one thought fits."""
  sound = thought.length and T and thought.placement in PLACEMENTS and not thought.faults()
  if sound and not capacity(thought, T, aligned):
    return [f"no thought fits into rows of data.sequence_length {T}: a smaller thought.stride or position does"]
  return []


def estimator_faults(goal: ObjectiveConfig, thought: ThoughtConfig) -> list[str]:
  """What ways to get at a gradient ask of the thoughts."""
  found = []
  if goal.exact:
    wanted = dict(kind="sampled", samples=1, report=0, answer=0)
    found += [
      f"objective.exact takes every thought of kind 'sampled' once: it needs thought.{name} {value!r}, got "
      f"{getattr(thought, name)!r}"
      for name, value in wanted.items()
      if getattr(thought, name) != value
    ]
    if thought.length == 0 or thought.temperature == 0:
      found.append("objective.exact needs thought.length and thought.temperature above 0: there is nothing to sum over")
    if thought.halting not in enumeration.HALTING:
      found.append(f"objective.exact needs thought.halting {' or '.join(enumeration.HALTING)}, got {thought.halting!r}")
  if goal.exact and goal.kl_weight:
    found.append("objective.kl_weight is estimated from drawn thoughts, objective.exact draws none")
  if bool(goal.control) != bool(thought.relaxation):
    found.append(
      "objective.control weighs what thought.relaxation makes: set both above 0 or neither, got "
      f"{goal.control} and {thought.relaxation}"
    )
  if thought.length and thought.kind == "noisy":
    if goal.entropy_weight:
      found.append("objective.entropy_weight: the entropy of kind 'noisy' is a constant, of thought.noise alone")
    if goal.score_weight and not thought.rescore:
      found.append(
        "thought.rescore false differentiates noisy thoughts through their mixtures, which leaves nothing to "
        "objective.score_weight: set one of the two"
      )
  return found


def size_faults(goal: ObjectiveConfig, thought: ThoughtConfig, data) -> list[str]:
  """What only the data (pipeline.Data) tell: too many thoughts to sum over in its rows."""
  N = capacity(thought, data.sequence_length, data.aligned)
  return enumeration.faults(thought, data.vocabulary.size, N) if goal.exact else []


def rethought_faults(thought: ThoughtConfig, config, data, model) -> list[str]:
  """Thoughts that the parameters and rows (pipeline.Data) of a run with another ThoughtConfig cannot have.

  Rules of the objective play no part: nothing is trained.
  """
  found = answer_faults(thought, config.data) + label_faults(thought, config.data)
  found += room_faults(thought, data.sequence_length, data.aligned)
  found += head_faults(thought, config.objective, config.data, model)
  if thought.confidences not in (0, model.confidences):
    found.append(
      f"these thoughts report one of {thought.confidences} confidences (thought.bins), this run was trained with "
      f"{model.confidences}"
    )
  return found


def mesh_faults(sequence: int, thought: ThoughtConfig) -> list[str]:
  """Thoughts that a mesh with so many devices along a row would wait for: they are made one slot after another."""
  if sequence in (0, 1) or thought.topology == "private" or not thought.serial or thought.rescored:
    return []
  return [
    f"mesh.sequence {sequence} splits a row, but persistent thoughts of kind {thought.kind!r} run through it slot by "
    "slot: use mesh.fsdp or mesh.tensor"
  ]


def answer_faults(thought: ThoughtConfig, data) -> list[str]:
  """Thoughts before an answer, where not every row of the config section `data` is a prompt without weight and one."""
  asks = data.source == "verdicts" or (data.source == "task" and data.task.asks)
  if thought.length and thought.placement == "answer" and not asks:
    return [
      "thought.placement 'answer' needs prompts and answers: data.source task (with a text task, and "
      "data.task.weigh_prompt off) or verdicts"
    ]
  return []


def report_faults(goal: ObjectiveConfig, thought: ThoughtConfig) -> list[str]:
  """What pay for a spoken distribution asks for."""
  if goal.calibration_weight and not goal.score_weight:
    return ["objective.calibration_weight is paid by the policy gradient, whose objective.score_weight is 0"]
  if goal.scoring != ObjectiveConfig.scoring and not thought.report:
    return [f"objective.scoring {goal.scoring!r} judges what a thought reports: it needs thought.report above 0"]
  if not goal.score_weight or thought.confidences:
    return []
  asks = dict(reward=REWARDS[goal.reward].report and goal.reward, calibration_weight=goal.calibration_weight)
  return [f"objective.{name} {value!r} needs thought.report above 0" for name, value in asks.items() if value]


def label_faults(thought: ThoughtConfig, data) -> list[str]:
  """Thoughts that use a prediction of words, where a verdict is a label."""
  wanted = dict(mixing="none", report=0, answer=0, relaxation=0.0)
  if not thought.length or data.source != "verdicts" or not data.verdicts.label:
    return []
  return [
    f"data.verdicts.label predicts a label by a head: it needs thought.{name} {value!r}, got {getattr(thought, name)!r}"
    for name, value in wanted.items()
    if getattr(thought, name) != value
  ]


def reward_faults(goal: ObjectiveConfig, thought: ThoughtConfig, data) -> list[str]:
  """What pay for a sampled answer asks for; data: the config section."""
  member, found = REWARDS[goal.reward], []
  if goal.score_weight and member.answer and not thought.answer:
    found.append(f"objective.reward {goal.reward!r} needs thought.answer above 0")
  if thought.answer and not (goal.score_weight and member.answer):
    known = " or ".join(repr(name) for name, other in REWARDS.items() if other.answer)
    found.append(f"thought.answer {thought.answer} is paid by nothing: objective.score_weight and reward {known} do")
  if not goal.score_weight or not member.task:
    return found
  tagging = data.source == "task" and data.task.name in TAGGING
  if data.source not in ("task", "verdicts"):
    found.append(
      f"objective.reward {goal.reward!r} needs a task: data.source 'task' or 'verdicts', got {data.source!r}"
    )
  if tagging and thought.answer > 1:
    found.append(f"thought.answer {thought.answer}: data.task.name {data.task.name!r} asks for one label")
  if data.source == "task" and data.task.written:
    found.append(f"objective.reward {goal.reward!r} judges an answer without written steps: set data.task.written to 0")
  return found


def update_faults(updates: int, goal: ObjectiveConfig) -> list[str]:
  """Several updates on the same rows that would be no more than several steps."""
  if updates > 1 and not goal.score_weight:
    return [
      f"train.updates {updates} are updates on thoughts that were drawn once, for the policy gradient, whose "
      "objective.score_weight is 0: without it, use more steps"
    ]
  if updates > 1 and goal.control:
    return ["objective.control goes with the draw itself: it needs train.updates 1"]
  if updates == 1:
    return [
      f"objective.{name} {getattr(goal, name)!r} is read where train.updates is above 1: with one, every ratio is 1"
      for name in ("ratio", "clip_low", "clip_high")
      if getattr(goal, name) != getattr(ObjectiveConfig, name)
    ]
  return []


def objective_faults(goal: ObjectiveConfig, thought: ThoughtConfig) -> list[str]:
  """What an objective asks of the thoughts."""
  found, needs = [], ADVANTAGES[goal.advantage].needs
  for name in ("score_weight", "entropy_weight", "kl_weight"):
    if getattr(goal, name) and not (thought.kind_of.policy and thought.length):
      found.append(
        f"objective.{name} needs thoughts with a log-probability: thought.kind 'sampled' or 'noisy' and thought.length "
        f"above 0, got kind {thought.kind!r} and length {thought.length}"
      )
    elif getattr(goal, name) and thought.temperature == 0:
      found.append(f"objective.{name} needs thought.temperature above 0: a greedy thought has no gradient")
  if goal.score_weight and not found and thought.samples < needs:
    found.append(
      f"objective.advantage {goal.advantage!r} needs thought.samples of at least {needs}, got {thought.samples}"
    )
  baseline = ADVANTAGES[goal.advantage].baseline
  if goal.score_weight and baseline and BASELINES[baseline].greedy and not thought.kind_of.discrete:
    found.append(f"objective.advantage {goal.advantage!r} needs thought.kind 'sampled', got {thought.kind!r}")
  if goal.base_weight and not thought.length:
    found.append("objective.base_weight needs thought.length above 0: without thoughts nll_weight weighs the same")
  if thought.learns_end:
    if goal.bound != "J" or goal.reward not in ("log_prob", "info_gain"):
      found.append(
        f"thought.halting {thought.halting!r} is learned by the expected log-probability over its ends: it needs "
        f"objective.bound 'J' and objective.reward 'log_prob' or 'info_gain', got {goal.bound!r} and {goal.reward!r}"
      )
    if not goal.nll_weight:
      found.append(f"thought.halting {thought.halting!r} is learned by the term of objective.nll_weight, which is 0")
  else:
    if goal.halt_weight:
      found.append(
        f"objective.halt_weight needs thoughts whose end is learned: thought.halting ponder or router, got "
        f"{thought.halting!r}"
      )
    if goal.price and not goal.score_weight:
      found.append("objective.price is paid by the policy gradient, whose objective.score_weight is 0")
    if goal.halt_prior != ObjectiveConfig.halt_prior:
      found.append(f"objective.halt_prior is read by thought.halting ponder and router, got {thought.halting!r}")
    taught = goal.score_weight or goal.exact
    if not taught and thought.length and (thought.may_stop or thought.report):
      what = "thought.report is a part of the thought" if thought.report else "thought.halting 'stop' is a part of it"
      found.append(f"{what} that nothing teaches: objective.score_weight is 0")
  found += report_faults(goal, thought)
  if thought.topology != "private":
    if goal.base_weight:
      found.append(
        "objective.base_weight needs thought.topology 'private': with 'persistent' there is no pass without thoughts"
      )
    if goal.bound != "J" and thought.length and thought.lookahead:
      found.append(
        f"objective.bound {goal.bound!r} is joint over all that thoughts change: persistent thoughts need "
        f"thought.lookahead 0 (the rest of the document), got {thought.lookahead}"
      )
  return found
