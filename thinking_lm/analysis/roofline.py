"""A training step's time on a pod by its slowest resource: an estimate with its assumptions, never a timing."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax

from thinking_lm.analysis.chips import Chip
from thinking_lm.analysis.flops import Ledger, plain_floor, slots, training_flops, training_ledger

ASSUMPTIONS = (
  "matrix products run at the chip's peak, bf16 in and float32 accumulated; attention scores stay on the chip",
  "weights are read once a call of all layers, forward, twice backward, once more for remat; activations likewise",
  "collectives use all links of a chip at once and nothing else delays them; loops count as often as they run",
  "between slices only gradients travel, float32, all-reduced on a ring",
  "fast: compute, memory and network overlap fully, the step takes the longest; slow: they follow one another",
)


class Estimate(NamedTuple):
  """Seconds of a step by what it waits for, and what share of the peak does needed work.

  fast, slow: the step if all overlap, and if nothing does. mfu_thinking: `Ledger.floor` over the peak, thinking
  included; mfu_real: the plain decoder's floor on the same real tokens over the peak. Both are of `fast`.
  """

  compute: float
  memory: float
  network: float
  slices: float
  fast: float
  slow: float
  mfu_thinking: float
  mfu_real: float


def memory_bytes(config, parameters: int, T: int, sizes: Mapping[str, int]) -> float:
  """Bytes of HBM that one device moves in a step.

  Weights in the compute type for every call of the layers, split over `tensor` only; float32 parameters, two moments
  and gradients, read or written seven times; the inputs and outputs of each layer's products for every slot.
  """
  m = config.model
  rows, calls = slots(config.thought, T, config.data.aligned)
  passes = 3 + (m.remat == "full")
  width = 2 if m.compute_dtype == "bfloat16" else 4
  E = m.resolved_head_width
  channels = 6 * m.width + 2 * E * (m.heads + m.resolved_kv_heads) + 3 * m.resolved_mlp_width
  rows_here = config.train.batch_size * rows / math.prod(sizes.values()) * sizes["tensor"]
  weights = calls * config.train.accumulation * passes * width * parameters / sizes["tensor"]
  state = 7 * 4 * parameters / (sizes["fsdp"] * sizes["tensor"])
  activations = passes * width * rows_here * m.layers * channels / sizes["tensor"]
  return weights + state + activations


def estimate(
  config, vocabulary_size: int, T: int, parameters: int, chip: Chip, mesh: jax.sharding.Mesh, slices: int, travel: float
) -> Estimate:
  """The estimate of a training step; `travel` is `collectives.travelled` of its program."""
  devices, sizes = mesh.size, dict(mesh.shape)
  needed = training_ledger(config, vocabulary_size, T)
  compute = training_flops(config, vocabulary_size, T) / (devices * chip.flops)
  memory = memory_bytes(config, parameters, T, sizes) / chip.hbm
  network = travel / chip.ici
  gradients = 4 * parameters / (sizes["fsdp"] * sizes["tensor"])
  between = 2 * gradients * (slices - 1) / slices / chip.dcn
  parts = (compute, memory, network, between)
  fast, slow = max(parts), sum(parts)
  share = lambda flops: flops / (fast * devices * chip.flops)
  return Estimate(*parts, fast, slow, share(needed.floor), share(plain_floor(config, vocabulary_size, T)))


def table(ledger: Ledger) -> dict[str, float]:
  """FLOPs of a step by purpose."""
  return dataclasses.asdict(ledger) | dict(total=ledger.total, floor=ledger.floor)
