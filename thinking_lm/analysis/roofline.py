"""A training step's time on a pod by its slowest resource: an estimate with its assumptions, never a timing."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax

from thinking_lm.analysis import collectives
from thinking_lm.analysis.chips import GB, Chip
from thinking_lm.analysis.flops import Ledger
from thinking_lm.analysis.traffic import training_traffic
from thinking_lm.analysis.training import plain_floor, training_ledger


def assumptions(chip: Chip) -> tuple[str, ...]:
  """What an estimate takes for granted, a line each."""
  return (
    f"matrix products run at the chip's peak, {chip.flops / 1e12:.0f} TFLOP/s: bf16 in and float32 accumulated",
    f"memory moves {chip.hbm / GB:.0f} GB/s of what analysis/traffic.py counts: scores and logits are written and read",
    f"collectives use all links of a chip at once, {chip.ici / GB:.0f} GB/s, an all-reduce for twice its bytes, and "
    "nothing else delays them",
    f"between slices (of GPUs: hosts) travels what the program sends there, on a ring, {chip.dcn / GB:.4g} GB/s a chip",
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


def estimate(
  config,
  vocabulary_size: int,
  T: int,
  parameters: int,
  chip: Chip,
  mesh: jax.sharding.Mesh,
  slices: int,
  found: Mapping[str, collectives.Collective],
) -> Estimate:
  """The estimate of a training step; `found` are the collectives of its program."""
  devices, sizes = mesh.size, dict(mesh.shape)
  needed = training_ledger(config, vocabulary_size, T)
  compute = needed.total / (devices * chip.flops)
  memory = training_traffic(config, vocabulary_size, T, parameters, sizes).total / chip.hbm
  network = collectives.travelled(found) / chip.ici
  between = collectives.crossed(found, slices) / chip.dcn
  parts = (compute, memory, network, between)
  fast, slow = max(parts), sum(parts)
  share = lambda flops: flops / (fast * devices * chip.flops)
  return Estimate(*parts, fast, slow, share(needed.floor), share(plain_floor(config, vocabulary_size, T)))


def table(ledger: Ledger) -> dict[str, float]:
  """FLOPs of a step by purpose."""
  return dataclasses.asdict(ledger) | dict(total=ledger.total, floor=ledger.floor)
