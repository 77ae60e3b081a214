"""The plan of a run on a pod: what fits, what travels, how many FLOPs, and a roofline."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from thinking_lm.analysis import ahead, roofline
from thinking_lm.analysis.chips import GIB, Chip
from thinking_lm.analysis.flops import Ledger
from thinking_lm.analysis.traffic import Traffic, training_traffic
from thinking_lm.analysis.training import training_ledger
from thinking_lm.errors import ConfigError
from thinking_lm.model.generate import Sampling
from thinking_lm.training.mesh import device_faults, make_mesh

PARTS = ("train", "generate", "evaluate")


class Decode(NamedTuple):
  """What the sampler is compiled for. rows 0: one for each device that splits rows."""

  rows: int
  prompt: int
  tokens: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """What was found.

  traffic: of the training step, of one device. parts: name -> ahead.Compiled. estimate: of the training step, None if
  that was not compiled. unchanged: parts that were not compiled, as their fingerprints were known.
  """

  config: Any
  chip: Chip
  mesh: Mapping[str, int]
  devices: int
  parameters: int
  ledger: Ledger
  traffic: Traffic
  parts: Mapping[str, ahead.Compiled]
  estimate: roofline.Estimate | None
  unchanged: tuple[str, ...] = ()


def plan(
  built: Any,
  chip: Chip,
  devices: Sequence,
  slices: int,
  parts: Sequence[str],
  decode: Decode,
  known: Mapping[str, str] | None = None,
) -> Plan:
  """Compiles parts of an Experiment for the devices of a pod, `slices` groups that the data-centre network joins.

  Args:
    known: fingerprints of parts that need not be compiled again (`ahead.fingerprint`).

  Raises:
    ConfigError: a mesh that does not fit the devices, or rows that it does not divide.
  """
  c, T, V = built.config, built.data.sequence_length, built.data.vocabulary.size
  mesh = make_mesh(c.mesh, devices)
  if faults := device_faults(c.mesh, c.train.batch_size, c.train.accumulation, mesh.size):
    raise ConfigError(faults)
  named = slices == 1 or devices[0].platform == "tpu"  # else the groups of a collective say what crosses
  within = 0 if named else mesh.size // slices
  known = known or {}
  tried = {}
  for name in parts:
    part = program(name, built, mesh, decode)
    tried[name] = ahead.compiled(part, mesh, chip.usable, within=within, known=known.get(name))
  found = {name: part for name, part in tried.items() if part is not None}
  unchanged = tuple(name for name, part in tried.items() if part is None)
  parameters = built.model.size
  guess = None
  if "train" in found and found["train"].fits:
    guess = roofline.estimate(c, V, T, parameters, chip, mesh, slices, found["train"].collectives)
  moved = training_traffic(c, V, T, parameters, mesh.shape)
  ledger = training_ledger(c, V, T)
  return Plan(c, chip, dict(mesh.shape), mesh.size, parameters, ledger, moved, found, guess, unchanged)


def program(name: str, built: Any, mesh: Any, decode: Decode) -> ahead.Part:
  """What is compiled of one of PARTS."""
  if name == "train":
    return ahead.train(built, mesh)
  if name == "evaluate":
    return ahead.evaluate(built, mesh)
  rows = decode.rows or mesh.shape["data"] * mesh.shape["fsdp"]
  return ahead.generate(built, mesh, Sampling(decode.tokens), rows, decode.prompt)


def show(plan: Plan, where: str) -> str:
  """The plan as text."""
  mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
  lines = [f"{plan.parameters / 1e9:.2f} B parameters on {where}, {plan.devices} devices: {mesh}"]
  for name, part in plan.parts.items():
    verdict = "fits" if part.fits else "DOES NOT FIT"
    limit = plan.chip.usable / GIB
    lines.append(f"\n{name}: {verdict}, {part.peak / GIB:.2f} of {limit:.2f} GiB a device (XLA {part.level})")
    held = [*part.arguments.items(), ("temporaries", part.temporaries)]
    lines.append("  " + ", ".join(f"{kind} {size / GIB:.3f}" for kind, size in held if size))
    for kind, each in part.collectives.items():
      lines.append(f"  {kind:<26}{each.instructions:>4} in the program, {each.runs:>6} run, {each.bytes / GIB:.2f} GiB")
    if part.unknown_loops:
      lines.append(f"  ({part.unknown_loops} loops run an unknown number of times: theirs are counted once)")
  flops = roofline.table(plan.ledger)
  lines.append("\nFLOPs of a training step: " + ", ".join(f"{name} {value:.3g}" for name, value in flops.items()))
  moved = ", ".join(f"{name} {size / GIB:.3g}" for name, size in dataclasses.asdict(plan.traffic).items() if size)
  total = plan.traffic.total
  lines.append(
    f"GiB that it moves on a device: {moved}, total {total / GIB:.3g}; {plan.ledger.total / plan.devices / total:.0f} "
    f"FLOPs a byte, where the chip could do {plan.chip.flops / plan.chip.hbm:.0f}"
  )
  if plan.estimate:
    e = plan.estimate
    lines.append(
      f"roofline: compute {e.compute:.3g} s, memory {e.memory:.3g} s, network {e.network:.3g} s, between slices "
      f"{e.slices:.3g} s: a step takes {e.fast:.3g} s (all overlap) to {e.slow:.3g} s (nothing does); MFU at best "
      f"{e.mfu_thinking:.1%} thinking included, {e.mfu_real:.1%} for the real tokens alone"
    )
    lines += [f"  assumed: {line}" for line in roofline.assumptions(plan.chip)]
  return "\n".join(lines)
