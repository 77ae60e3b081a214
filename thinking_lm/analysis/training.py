"""The ledger of a training step: rows with their gradient, every update on them, and the passes beside.

Beside are the passes without a gradient: those without thoughts that say where to think (a placement by need) or what
the teacher predicts, greedy thoughts, the reference's log-probabilities, the draw before several updates; and the
relaxed copies of control variates. What a pass makes and nobody reads, XLA does not compute, and it is not counted: the
heads of targets where only the policy is asked for, and the reverse.
"""

import dataclasses
from collections.abc import Iterator

from thinking_lm.analysis.flops import Ledger, causal_keys, head_flops, layer_flops, ledger, replays
from thinking_lm.model.decoder import ModelConfig
from thinking_lm.model.enumeration import CHUNK
from thinking_lm.objectives.advantages import ADVANTAGES
from thinking_lm.objectives.baselines import BASELINES, compares
from thinking_lm.objectives.rewards import REWARDS
from thinking_lm.objectives.variates import VARIATES
from thinking_lm.thoughts import enumeration
from thinking_lm.thoughts.placement import capacity


def training_ledger(config, vocabulary_size: int, T: int, proxy: ModelConfig | None = None) -> Ledger:
  """The ledger of one training step of an ExperimentConfig, optimizer left out.

  Args:
    proxy: the model of thought.proxy, if there is one.
  """
  row = (_every_thought if config.objective.exact else _drawn_thoughts)(config, vocabulary_size, T)
  if config.thought.by_need:
    row = dataclasses.replace(row, beside=row.beside + _plain(config, vocabulary_size, T, proxy))
  return row.times(config.train.batch_size)


def training_flops(config, vocabulary_size: int, T: int, proxy: ModelConfig | None = None) -> float:
  """FLOPs of one training step of an ExperimentConfig, optimizer left out."""
  return training_ledger(config, vocabulary_size, T, proxy).total


def rematerialises(config) -> bool:
  """Whether `model.remat` plays a part in a training step of an ExperimentConfig.

  It does in passes over many slots, and so where thoughts are given (all of them, or those of several updates); not
  where the backward pass is our own (model/reverse.py, model/replay.py).
  """
  thought = config.thought
  if config.objective.exact or config.train.updates > 1:
    return True
  return not (replays(thought) if thought.topology == "private" else thought.serial and not thought.rescored)


def _drawn_thoughts(config, vocabulary_size: int, T: int) -> Ledger:
  """A row, drawn and scored with its gradient; or drawn once, and scored in each of several updates."""
  updates = config.train.updates
  made = dict(aligned=config.data.aligned, gradient=True, given=updates > 1)
  row = ledger(config.model, vocabulary_size, config.thought, T, **made).times(updates)
  return dataclasses.replace(row, beside=sum(_beside(config, vocabulary_size, T, row)))


def _beside(config, vocabulary_size: int, T: int, row: Ledger) -> Iterator[float]:
  """The passes of `thinking_lm.beside`, the draw of several updates, and relaxed copies."""
  model, thought, goal = config.model, config.thought, config.objective
  head, N = head_flops(model, vocabulary_size, thought), capacity(thought, T, config.data.aligned)
  pays = head * N * (thought.length + thought.answer) * (1 if thought.kind_of.discrete else 2)
  forward = lambda thought, **more: ledger(
    model, vocabulary_size, thought, T, aligned=config.data.aligned, gradient=False, **more
  )
  if compares(goal, thought):
    yield _plain(config, vocabulary_size, T)
  baseline = ADVANTAGES[goal.advantage].baseline if goal.score_weight else None
  if baseline and BASELINES[baseline].greedy:
    one = forward(dataclasses.replace(thought, samples=1, temperature=0.0))
    base = thought.topology == "private" and not (REWARDS[goal.reward].base and not goal.teacher_decay)
    yield one.total - (0 if replays(thought) else pays) - base * T * head
  if goal.kl_weight:
    scored = forward(thought, given=True)
    yield scored.base + scored.think + thought.samples * pays
  if config.train.updates > 1:
    drawn = forward(thought)
    yield drawn.base + drawn.think + drawn.draw + thought.samples * pays
  copies = thought.samples * N
  if thought.relaxation and VARIATES[goal.variate].head:  # mixed twice, once with a gradient of a gradient
    yield copies * (head * (3 + 2 + 4) + 9 * 4.0 * model.width**2)  # policy, mixtures, the head
  elif thought.relaxation:  # through the model once more, which itself gets no gradient
    yield 2 * row.think + copies * head * (3 * thought.lookahead + 3 + 4)  # targets, policy, mixtures


def _plain(config, vocabulary_size: int, T: int, model: ModelConfig | None = None) -> float:
  """A pass over the real tokens alone that predicts after each, by a model like the config's or another one."""
  model = model or config.model
  return layer_flops(model, T, causal_keys(model, T)) + T * head_flops(model, vocabulary_size, config.thought)


def _every_thought(config, vocabulary_size: int, T: int) -> Ledger:
  """A row and its gradient when all thoughts are scored and none drawn, in parts that the backward pass runs again."""
  Z = enumeration.number(config.thought, vocabulary_size, capacity(config.thought, T, config.data.aligned))
  parts = -(-Z // CHUNK)
  few = dataclasses.replace(config.thought, samples=-(-Z // parts))
  row = ledger(config.model, vocabulary_size, few, T, aligned=config.data.aligned, gradient=True, given=True)
  again = row.forward if parts > 1 else 0.0
  return dataclasses.replace(row, backward=row.backward + again).times(parts)


def plain_floor(config, vocabulary_size: int, T: int) -> float:
  """`Ledger.floor` of one update on the same real tokens without any thought."""
  without = dataclasses.replace(config.thought, length=0)
  row = ledger(config.model, vocabulary_size, without, T, aligned=config.data.aligned, gradient=True)
  return row.floor * config.train.batch_size
