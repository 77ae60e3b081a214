"""Evaluation while a model trains: with and without thoughts, on the same tokens. It only looks at the state."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from thinking_lm import metrics
from thinking_lm.config import option
from thinking_lm.data.sources import SPLITS
from thinking_lm.errors import ConfigError
from thinking_lm.evaluation.evaluators import Subject
from thinking_lm.metrics import Mean
from thinking_lm.types import Batch, Params, Trace

Feed = Callable[[int, Callable[..., Iterator[Batch]]], Iterator[Batch]]
"""(rows of a batch, a reader of these that takes `share`) -> batches on the devices."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """Evaluation during training. It changes nothing that is trained."""

  every: int = option(0, "steps between evaluations during training, and one at the end; 0: none", low=0)
  split: str = option("validation", "the rows that are evaluated", choices=SPLITS)
  limit: int = option(256, "rows, the first ones of the split; 0: all", low=0)
  batch_size: int = option(0, "rows at once; 0: as in training", low=0)


class Monitor:
  """The hook. Its numbers are nats per target, as `SPLIT_nll`, of one draw of the thoughts, and `SPLIT_nll_none`,
  without any; `SPLIT_accuracy` and `SPLIT_accuracy_none`; and `SPLIT_bits_per_byte`.

  Runs under the mesh that training has set, in all of its processes.

  Args:
    key: of the thoughts that are drawn; the same at every step, so that steps can be compared.
    feed: as `training.mesh.feed`, on the devices of a mesh.

  Raises:
    ConfigError: the split is empty.
  """

  def __init__(self, config: EvaluationConfig, subject: Subject, key: jax.Array, feed: Feed):
    self.every = config.every
    self._config, self._subject, self._key, self._feed = config, subject, key, feed
    self._size = config.batch_size or subject.config.train.batch_size
    thought = dataclasses.replace(subject.config.thought, samples=1)
    self._thoughts = dict(none=dataclasses.replace(thought, length=0)) | ({"": thought} if thought.length else {})
    if not subject.data.rows(config.split):
      raise ConfigError(f"evaluation.split={config.split} has no rows; name another one, or evaluation.every=0")
    self._step = jax.jit(self._sums)

  def __call__(self, step: int, state: Any) -> Mapping[str, float]:
    """Numbers of the state's parameters."""
    del step
    limit = self._config.limit or None
    read = self._subject.data.evaluation_batches
    read = functools.partial(read, self._config.split, batch_size=self._size, limit=limit)
    total = None
    for batch in self._feed(self._size, read):
      sums = jax.tree.map(np.float64, jax.device_get(self._step(state.params, batch)))
      total = sums if total is None else metrics.add(total, sums)
    return {f"{self._config.split}_{name}": value for name, value in metrics.values(total).items()}

  def _sums(self, params: Params, batch: Batch) -> dict[str, Mean]:
    found = {}
    for name, thought in self._thoughts.items():
      trace = self._subject.rollout(params, batch, self._key, thought=thought)
      tail = f"_{name}" if name else ""
      found[f"nll{tail}"] = Mean.of(-trace.logp_BGT[:, 0], trace.weights_BT)
      found[f"accuracy{tail}"] = Mean.of(trace.hit_BGT[:, 0], trace.weights_BT)
    return found | dict(bits_per_byte=self._bits(trace, batch))

  def _bits(self, trace: Trace, batch: Batch) -> Mean:
    """Of the model as it is trained: the last trace, that with thoughts if there are any."""
    bytes_BT = jnp.asarray(self._subject.data.vocabulary.bytes_V)[batch.targets_BT]
    nats = Mean.of(-trace.logp_BGT[:, 0], trace.weights_BT)
    return Mean(nats.total / math.log(2), jnp.sum(bytes_BT * trace.weights_BT))


def hooks(config: EvaluationConfig, subject: Subject, key: jax.Array, feed: Feed) -> tuple:
  """The hooks that a config asks for: a Monitor, or nothing."""
  return (Monitor(config, subject, key, feed),) if config.every else ()
