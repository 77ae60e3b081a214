"""What a plan must not exceed, kept in a file beside the configs: a change that makes a pod worse is seen."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from thinking_lm.analysis import roofline
from thinking_lm.analysis.chips import GIB
from thinking_lm.analysis.pods import Plan

SLACK = 1.05
"""How far the peak and the bytes that travel may be above the budget: what another compiler version may differ by."""


def record(plan: Plan) -> dict[str, Any]:
  """A plan as JSON values."""
  return dict(
    parameters=plan.parameters,
    mesh=dict(plan.mesh),
    chip=plan.chip._asdict(),
    flops=roofline.table(plan.ledger),
    device_bytes=dataclasses.asdict(plan.traffic) | dict(total=plan.traffic.total),
    parts={
      name: dataclasses.asdict(part) | dict(collectives={k: c._asdict() for k, c in part.collectives.items()})
      for name, part in plan.parts.items()
    },
    unchanged=list(plan.unchanged),
    estimate=plan.estimate and plan.estimate._asdict(),
    assumptions=roofline.assumptions(plan.chip),
  )


def budget(found: Mapping[str, Any]) -> dict[str, Any]:
  """What is kept of a record: for each part that was compiled its peak (GiB), the number and bytes (GiB) of its
  collectives, and the fingerprint that it has as long as it need not be compiled again.
  """
  return {
    name: dict(
      fingerprint=part["fingerprint"],
      peak_gib=round(part["peak"] / GIB, 3),
      collectives={
        kind: dict(instructions=each["instructions"], gib=round(each["bytes"] / GIB, 3))
        for kind, each in part["collectives"].items()
      },
    )
    for name, part in found["parts"].items()
  }


def entry_faults(name: str, entry: Any, parts: tuple[str, ...]) -> list[str]:
  """Lines about an entry of a budget file that is not what `budget` and its reader make of it."""
  if not isinstance(entry, dict) or not isinstance(entry.get("topology"), str):
    return [f"{name}: an entry is an object with a topology and parts"]
  asked, kept = entry.get("parts"), entry.get("budget", {})
  if not isinstance(asked, list) or not asked or any(part not in parts for part in asked):
    return [f"{name}: parts must be some of {', '.join(parts)}, got {asked}"]
  if not isinstance(entry.get("slices", 1), int) or not isinstance(kept, dict):
    return [f"{name}: slices must be a number, and budget an object"]
  sound = lambda part: isinstance(part, dict) and _number(part.get("peak_gib")) and _counts(part.get("collectives"))
  return [f"{name}: the budget of {part} has no peak_gib and collectives" for part in kept if not sound(kept[part])]


def _number(value: Any) -> bool:
  return isinstance(value, int | float)


def _counts(kinds: Any) -> bool:
  of_kind = lambda each: isinstance(each, dict) and all(_number(each.get(key)) for key in ("instructions", "gib"))
  return isinstance(kinds, dict) and all(map(of_kind, kinds.values()))


def known(entry: Mapping[str, Any], again: bool) -> dict[str, str]:
  """The fingerprints of an entry of a budget file: its parts that need not be compiled. again: all of them have to."""
  kept = {} if again else entry.get("budget", {})
  return {part: each["fingerprint"] for part, each in kept.items() if "fingerprint" in each}


def faults(kept: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
  """Lines about everything that is above its budget, or that does not fit; a part without a budget need only fit."""
  usable = found["chip"]["usable"] / GIB
  tight = [name for name in found["unchanged"] if kept[name]["peak_gib"] > usable]
  lines = [f"{name} does not fit: {kept[name]['peak_gib']} GiB" for name in tight]
  for name, now in budget(found).items():
    if not found["parts"][name]["fits"]:
      lines.append(f"{name} does not fit: {now['peak_gib']} GiB")
      continue
    before = kept.get(name)
    if before is None:
      continue
    if now["peak_gib"] > SLACK * before["peak_gib"]:
      lines.append(f"{name} peak {now['peak_gib']} GiB is above {before['peak_gib']}")
    for kind, each in now["collectives"].items():
      allowed = before["collectives"].get(kind, dict(instructions=0, gib=0.0))
      if each["instructions"] > allowed["instructions"] or each["gib"] > SLACK * allowed["gib"] + 0.001:
        lines.append(
          f"{name} {kind}: {each['instructions']} with {each['gib']} GiB, above {allowed['instructions']} with "
          f"{allowed['gib']}"
        )
  return lines


def brief(found: Mapping[str, Any]) -> str:
  """One line: what fits in how much."""
  same = found["unchanged"]
  if not found["parts"]:
    return f"unchanged since it was compiled: {', '.join(same)}"
  parts = ", ".join(f"{name} {part['peak'] / GIB:.2f}" for name, part in found["parts"].items())
  estimate = found["estimate"]
  rest = f"; unchanged since they were compiled: {', '.join(same)}" if same else ""
  tail = f"; a step of {estimate['fast']:.3g} s at best, MFU {estimate['mfu_thinking']:.0%}" if estimate else ""
  spent = sum(part["seconds"] for part in found["parts"].values())
  return f"{parts} of {found['chip']['usable'] / GIB:.2f} GiB a device{tail} ({spent:.0f} CPU s){rest}"
