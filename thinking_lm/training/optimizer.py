"""Optimizers and learning-rate schedules, all of them optax's.

An optimizer here gives the direction to descend, weight decay included, and the step multiplies it by the learning
rate of `TrainState.step`: one truth for the rate, whatever the optimizer, and it is what the metrics show.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from optax import contrib

from thinking_lm.config import option, pick

Axes = Any
"""A nested dict like the parameters with a tuple of logical axis names for every array."""


class Schedule(NamedTuple):
  """What comes after the warm-up.

  tail: (peak rate, number of steps, final fraction of the rate) -> the optax schedule of the decay.
  part: the part of the steps after the warm-up that `decay_steps = 0` gives to the decay.
  """

  tail: Callable[[float, int, float], optax.Schedule]
  part: float


def _constant(rate, length, final):
  return optax.constant_schedule(rate)


def _cosine(rate, length, final):
  return optax.cosine_decay_schedule(rate, length, alpha=final)


def _linear(rate, length, final):
  return optax.linear_schedule(rate, rate * final, length)


SCHEDULES = dict(constant=Schedule(_constant, 0.0), cosine=Schedule(_cosine, 1.0), wsd=Schedule(_linear, 0.2))


def _map_axes(function: Callable, axes: Axes) -> Any:
  return jax.tree.map(function, axes, is_leaf=lambda node: isinstance(node, tuple))


def is_matrix(axes: tuple[str | None, ...]) -> bool:
  """Whether one layer's array has two dimensions or more: norms and biases do not."""
  return sum(name != "layers" for name in axes) >= 2


def muon_dimensions(axes: tuple[str | None, ...]) -> contrib.MuonDimensionNumbers | None:
  """Which dimensions of an array Muon contracts and which it puts out; None leaves the array to Adam.

  The stacked layer axis is neither, so every layer is orthogonalised on its own. Several heads are one side of the
  matrix. Embeddings and the output head (`vocab`) and everything below a matrix stay with Adam, as in Muon's source.
  """
  if not is_matrix(axes) or "vocab" in axes:
    return None
  sides = [index for index, name in enumerate(axes) if name != "layers"]
  # The last dimension alone is the output when several come in (attention's output projection), else the first
  # alone is the input.
  cut = len(sides) - 1 if axes[sides[-1]] == "embed" else 1
  return contrib.MuonDimensionNumbers(tuple(sides[:cut]), tuple(sides[cut:]))


def _adamw(config: "OptimizerConfig", axes: Axes) -> optax.GradientTransformation:
  return optax.scale_by_adam(config.b1, config.b2, config.eps)


def _muon(config: "OptimizerConfig", axes: Axes) -> optax.GradientTransformation:
  muon = contrib.muon(
    learning_rate=1.0,
    beta=config.momentum,
    adam_b1=config.b1,
    adam_b2=config.b2,
    eps=config.eps,
    consistent_rms=config.muon_rms,
    muon_weight_dimension_numbers=_map_axes(muon_dimensions, axes),
  )
  # contrib.muon ends in a descent step; turned back into a direction, so that decay and rate are written once.
  return optax.chain(muon, optax.scale(-1.0))


OPTIMIZERS = dict(adamw=_adamw, muon=_muon)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The update rule."""

  name: str = option("adamw", "update rule", choices=OPTIMIZERS)
  learning_rate: float = option(1e-3, "peak learning rate", above=0.0)
  schedule: str = option("cosine", "shape of the learning rate after the warm-up", choices=SCHEDULES)
  warmup_steps: int = option(0, "steps of linear warm-up, at step s (from 0) the rate is (s + 1) / warmup_steps", low=0)
  decay_steps: int = option(
    0, "the last steps, over which the rate falls; 0 = all after the warm-up for cosine, a fifth for wsd", low=0
  )
  schedule_steps: int = option(
    0, "steps that the schedule spans, after which the rate stays as it ended; 0 = train.steps", low=0
  )
  final_fraction: float = option(0.1, "rate at the end of the decay, as a fraction of the peak", low=0.0, high=1.0)
  weight_decay: float = option(0.1, "decay per step and learning rate; never on norms and biases", low=0.0)
  b1: float = option(0.9, "first-moment decay of Adam", low=0.0, high=1.0)
  b2: float = option(0.95, "second-moment decay of Adam", low=0.0, high=1.0)
  eps: float = option(1e-8, "denominator offset of Adam", above=0.0)
  momentum: float = option(0.95, "momentum of Muon", low=0.0, high=1.0)
  muon_rms: float = option(0.2, "root mean square of a Muon update; 0.2 is about that of Adam", above=0.0)
  clip_norm: float = option(1.0, "largest global norm of the gradient; 0 = no clipping", low=0.0)
  ema: float = option(0.0, "decay per step of the averaged copy of the parameters; 0 = no copy", low=0.0, high=1.0)

  def faults(self):
    """Lines about decays that would never forget."""
    for name in ("b1", "b2", "momentum", "ema"):
      if getattr(self, name) >= 1:
        yield f"{name} must be below 1, got {getattr(self, name)}"


def schedule_faults(config: OptimizerConfig, steps: int) -> list[str]:
  """Lines about a schedule that does not fit a run of `steps` steps; empty when all is well."""
  span, name = (config.schedule_steps, "schedule_steps") if config.schedule_steps else (steps, "train.steps")
  if config.warmup_steps + config.decay_steps > span:
    return [
      f"optimizer.warmup_steps {config.warmup_steps} and decay_steps {config.decay_steps} do not fit into {name} {span}"
    ]
  return []


def changed_rates(old: tuple["OptimizerConfig", int], new: tuple["OptimizerConfig", int], finished: int) -> list[str]:
  """A line if so many finished steps would have had other learning rates under `new` than they had under `old`.

  Each is a config with the steps of its run: more steps stretch a schedule, also over what is done.
  """
  steps = np.arange(finished)
  rates, wanted = (np.broadcast_to(make_schedule(*each)(steps), steps.shape) for each in (old, new))
  different = np.flatnonzero(~np.isclose(rates, wanted, rtol=1e-5, atol=0))
  if not different.size:
    return []
  first, span = different[0], old[0].schedule_steps or old[1]
  return [
    f"config.train.steps {new[1]}: finished steps would have had another learning rate (step {first + 1}: "
    f"{rates[first]:.4g} as it was, {wanted[first]:.4g} now); config.optimizer.schedule_steps={span} keeps the "
    f"{new[0].schedule} schedule, whose rate then stays as it ends"
  ]


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """The schedule, step (from 0) -> learning rate: linear warm-up, the peak, and the decay that ends at `steps`, or at
  `schedule_steps` if that is set.
  """
  steps = config.schedule_steps or steps
  shape = pick(SCHEDULES, config.schedule, "schedule")
  decay = config.decay_steps or round(shape.part * (steps - config.warmup_steps))
  parts, borders = [optax.constant_schedule(config.learning_rate)], []
  if config.warmup_steps:
    first = config.learning_rate / config.warmup_steps
    parts.insert(0, optax.linear_schedule(first, config.learning_rate, max(config.warmup_steps - 1, 1)))
    borders.append(config.warmup_steps)
  if decay:
    parts.append(shape.tail(config.learning_rate, decay, config.final_fraction))
    borders.append(steps - decay)
  return optax.join_schedules(parts, borders)


def make_optimizer(config: OptimizerConfig, axes: Axes) -> optax.GradientTransformation:
  """The rule, gradient -> direction to go against: params - learning_rate * direction.

  The gradient is first clipped to `clip_norm` (global norm), then turned by the named rule, then weight decay is added
  for matrices and embeddings (decoupled, Loshchilov & Hutter 2019).
  """
  rule = pick(OPTIMIZERS, config.name, "optimizer")(config, axes)
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  decay = optax.add_decayed_weights(config.weight_decay, mask=_map_axes(is_matrix, axes))
  return optax.chain(clip, rule, decay)
