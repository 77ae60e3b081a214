"""The ledger's other half: analytic bytes that a training step moves between memory and chip.

Counted is what the products of `analysis/flops.py` read and write when each is a kernel of its own, with the
elementwise work around it fused into it: the weights once a call of all layers, the inputs and results of every
product, attention scores (the portable attention writes them out; a fused kernel would not), the cache that serial
calls read again, the head's logits, and float32 parameters, gradients and moments. Left out are masks, the gradients of
single calls and random keys. A compiler fuses more and less; the test says how far XLA's "bytes accessed" may be away.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

from thinking_lm.analysis.flops import beside_targets, causal_keys, replays
from thinking_lm.analysis.training import plain_floor, training_ledger
from thinking_lm.model.decoder import table_rows
from thinking_lm.model.serial import segments
from thinking_lm.thoughts.placement import blocks, capacity, cuts
from thinking_lm.training.writers import Work
from thinking_lm.types import Layout

FUSED = ("splash", "cudnn")
"""Values of model.attention that keep scores on the chip."""

SCORE = dict(forward=16, backward=20)
"""Bytes of an attention score, float32. Forward: written, read for the weights, and these written and read. Backward:
the weights' cotangent written and read, the weights read, the scores' cotangent written and read."""

LOGIT = dict(forward=12, backward=24)
"""Bytes of a logit, float32. Forward: written, read for the maximum, read for the sum. Backward: that again, and the
cotangent written and read by two products."""

STATE = 7
"""Times that four bytes of each parameter move in an update by AdamW: the gradient read; parameter and two moments read
and written."""


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Bytes of a step. All of them together are `total`.

  weights: matrices, in the compute type, once a call. activations: inputs and results of the layers' products. scores:
  of attention. cache: keys and values that serial calls read. logits: of the head. state: parameters, gradients and
  moments.
  """

  weights: float
  activations: float
  scores: float
  cache: float
  logits: float
  state: float

  @property
  def total(self) -> float:
    """All of it."""
    return math.fsum(dataclasses.asdict(self).values())


class Passes(NamedTuple):
  """How the layers run over a row in a training step.

  slots: of all streams, in one pass. scores: queries times keys of a pass. heads: states that the head reads. cached:
  keys that serial calls read, over all of these. forward, backward: calls of all layers. work: passes over all slots
  forward. again: the backward pass of a serial stream computes its layers again, whatever `remat` says.
  """

  slots: float
  scores: float
  heads: float
  cached: float = 0.0
  forward: int = 1
  backward: int = 1
  work: int = 1
  again: bool = False


def passes(model, thought, T: int, aligned: int) -> Passes:
  """The Passes of a row of T real tokens; of ThoughtConfig `thought`, `aligned` as of `placement.place`."""
  N, G, J = capacity(thought, T, aligned), thought.samples, thought.slots
  if not N:
    return Passes(T, T * causal_keys(model, T), T)
  scored = thought.length * (thought.kind_of.policy is not None) + thought.answer
  heads = G * N * scored + sum(beside_targets(thought, N))
  if thought.topology == "private":
    A = thought.lookahead - 1 + max(thought.answer - 1, 0)
    X, P = J + A, G * N
    found = Passes(T + P * X, T * causal_keys(model, T) + P * X * (T + X), T + P * thought.lookahead + heads)
    if not thought.serial:
      return found._replace(forward=2, backward=2)
    count = 1 + J + (A > 0)
    return found._replace(cached=J * (T + P * J), forward=count, backward=1 if replays(thought) else count)
  C, R = blocks(thought, T, N, aligned)
  sizes, tail = Layout(None, C, R, cuts=cuts(thought, T, N, aligned)).sizes(T)
  S = sum(sizes) + tail + J * len(sizes)
  found = Passes(G * S, G * S * causal_keys(model, S), G * T + heads)
  if thought.iterations:
    return found._replace(
      forward=thought.iterations, backward=thought.through or thought.iterations, work=thought.iterations
    )
  if not thought.serial:
    return found
  plan, end, scores, cached, count = segments(thought, sizes, tail), 0, 0, 0, 0
  for shape in plan:
    end += shape.slots
    scores += G * shape.slots * end
    cached += G * shape.rounds * (1 + shape.singles) * end
    count += shape.rounds * (1 + shape.singles)
  if thought.rescored:  # drawn serially, then scored in one parallel pass with the gradient
    return found._replace(cached=cached, forward=count + 1, work=2)
  return found._replace(scores=scores, cached=cached, forward=count, backward=count, again=True)


def layer_channels(model) -> int:
  """Numbers that one layer's products read and write for one slot.

  D + (H + 2 K) E by the three projections, (2 H + 2 K) E by attention besides scores, H E + D by the one after it,
  D + 2 F and F + D by the MLP; twice D for the two residual sums.
  """
  D, E, F = model.width, model.resolved_head_width, model.resolved_mlp_width
  return 6 * D + 4 * E * (model.heads + model.resolved_kv_heads) + 3 * F


def gradient_traffic(
  model, thought, vocabulary_size: int, T: int, parameters: int, rows: float, aligned: int, micro=1, tensor=1
) -> Traffic:
  """The Traffic of a loss and its gradient, of a ModelConfig and a ThoughtConfig.

  Args:
    parameters: their number. rows: of T real tokens. aligned: as of `placement.place`. micro: batches that the rows are
      taken in; gradients are written, of several the sum is read and written as well. tensor: devices that split
      weights; then of one of these, which have the same rows.
  """
  width = 2 if model.compute_dtype == "bfloat16" else 4
  run = passes(model, thought, T, aligned)
  again = run.again or model.remat == "full"
  table = model.width * table_rows(model, vocabulary_size, thought.confidences)
  layers = parameters - table * (1 if model.tie_embeddings else 2)
  backward = 1 + again
  written = model.attention not in FUSED
  key = 2 * model.resolved_kv_heads * model.resolved_head_width  # and its value
  return Traffic(
    weights=micro * width * ((run.forward + run.backward * backward) * layers + 3 * table) / tensor,
    activations=rows * width * (run.work + 1 + backward) * model.layers * run.slots * layer_channels(model) / tensor,
    scores=written
    * (rows * model.layers * model.heads * run.scores / tensor)
    * ((run.work + again) * SCORE["forward"] + SCORE["backward"]),
    cache=rows * width * (1 + run.again) * model.layers * run.cached * key / tensor,
    logits=rows * sum(LOGIT.values()) * run.heads * table / model.width / tensor,
    state=4 * (3 * micro if micro > 1 else 1) * parameters / tensor,
  )


def training_traffic(config, vocabulary_size: int, T: int, parameters: int, sizes: Mapping[str, int] | None = None):
  """The Traffic of one training step of an ExperimentConfig.

  Args:
    parameters: their number. sizes: mesh axis -> devices; then of one of the devices: what rows split is divided by all
      of them but `tensor`, weights by `tensor` (each device gathers the rest before it reads it), state by both `fsdp`
      and `tensor`. None: of one device that does it all.
  """
  sizes = sizes or dict(fsdp=1, tensor=1)
  tensor, micro = sizes["tensor"], config.train.accumulation
  rows = config.train.batch_size * tensor / math.prod(sizes.values())
  each = vocabulary_size, T, parameters
  gradient = gradient_traffic(config.model, config.thought, *each, rows, config.data.aligned, micro, tensor)
  updated = 4 * (STATE + 2 * (config.optimizer.ema > 0)) * parameters / tensor
  casts = 6 * micro * parameters / tensor * (config.model.compute_dtype == "bfloat16")  # float32 read, bfloat16 written
  return dataclasses.replace(gradient, state=(gradient.state + updated + casts) / sizes["fsdp"])


def work(config, vocabulary_size: int, T: int, parameters: int, peak: float) -> Work:
  """A training step's Work on devices of so many FLOP/s together."""
  needed, plain = training_ledger(config, vocabulary_size, T).floor, plain_floor(config, vocabulary_size, T)
  return Work(needed, plain, training_traffic(config, vocabulary_size, T, parameters).total, peak)
