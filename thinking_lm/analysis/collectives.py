"""Collectives of a compiled program, read off its HLO text: how many, of what kind, how many bytes.

XLA prints a loop's body once; here it counts as often as the loop runs. On TPU a gradient's reduce-scatter is a fusion
that is named all-reduce-scatter, never an instruction of that kind. What crosses between slices counts as a kind of its
own (`SLICES`): on TPU it is handed to the host, which the text shows as a receive that says what it is a part of;
elsewhere it is a collective whose groups say so.
"""

import collections
import math
import re
from typing import NamedTuple

import numpy as np

WIDTHS = dict(pred=1, s8=1, u8=1, s16=2, u16=2, f16=2, bf16=2, s32=4, u32=4, f32=4, s64=8, u64=8, f64=8)
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
SLICES = " between slices"
"""What the name of a kind ends with if it goes over the data-centre network: "all-reduce between slices"."""

TRAVEL = collections.defaultdict(lambda: 1.0, {"all-reduce": 2.0})
"""Bytes that a device receives for each byte of a collective's whole array, on a ring of many devices."""

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ((?:\([^()]*(?:\([^()]*\)[^()]*)*\)|\S+)) ([\w\-]+)\(")
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LIMIT = re.compile(r" = [su]32\[\]\S* constant\((\d+)\)")
_HOST = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_KNOWN = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')

# The ways to write who takes part: a list of groups, or of pairs; a grid of ids; some axes of a mesh of ids.
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")
_GRID = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
  r"replica_groups=mesh\[([^\]]+)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{('\w+'(?:, ?'\w+')*)\}"
)


class Collective(NamedTuple):
  """All collectives of one kind.

  instructions: in the text. runs: how often they run in one call of the program. bytes: of the whole arrays (what is
  gathered, reduced or exchanged) as one device sees them, over all runs.
  """

  instructions: int
  runs: int
  bytes: int


def sizes(text: str) -> list[int]:
  """Bytes of every array type in a piece of HLO text."""
  return [
    WIDTHS.get(kind, 4) * math.prod(int(size) for size in shape.split(",") if size)
    for kind, shape in _SHAPE.findall(text)
  ]


def groups(line: str) -> list[list[int]]:
  """Who takes part in the collective of a line of HLO text: positions in the mesh, of each group or pair.

  Raises:
    ValueError: it is written in none of the known ways (`{}`, all devices, is not one: XLA names them).
  """
  if found := _LISTED.search(line):
    return [_numbers(group) for group in re.findall(r"\{([\d, ]*)\}", found[1])]
  if found := _GRID.search(line):
    return _grid(found[2], found[3]).reshape(_numbers(found[1])).tolist()
  if found := _MESH.search(line):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    over = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", found[4])]
    ids = _grid(found[2], found[3]) if found[2] else np.arange(math.prod(sizes.values()))
    last = np.moveaxis(ids.reshape(*sizes.values()), over, range(-len(over), 0))
    return last.reshape(-1, math.prod(last.shape[-len(over) :])).tolist()
  raise ValueError(f"no groups are known in {line.strip()!r}")


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(",") if number.strip()]


def _grid(shape: str, order: str | None) -> np.ndarray:
  ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
  return ids.transpose(_numbers(order)) if order else ids


def read(text: str, within: int = 0) -> tuple[dict[str, Collective], int]:
  """(kind -> Collective, number of loops whose trips are not known and count as one).

  A `while_loop` that runs until something happens (decoding) has no known trips: its collectives are those of a step.

  within: devices that stand together in the mesh and form a slice (on GPUs a host), to know by its groups what crosses
  between these; 0: the program says so itself, or there is one slice.
  """
  bodies, entry = _computations(text)
  found: dict[str, list[int]] = {}
  unknown = 0

  def walk(name: str, times: int) -> None:
    nonlocal unknown
    for line in bodies.get(name, ()):
      match = _INSTRUCTION.match(line)
      if not match:
        continue
      label, shape, op = match.groups()
      kind = op.removesuffix("-start")
      if op == "fusion" and label.startswith("all-reduce-scatter"):
        inner = [line for called in _CALLED.findall(line) for line in bodies.get(called, ())]
        whole = [sum(sizes(found[2])) for found in map(_INSTRUCTION.match, inner) if found and found[3] == "all-reduce"]
        _count(found.setdefault("reduce-scatter", [0, 0, 0]), times, max(whole, default=sum(sizes(shape))))
        continue
      if kind in KINDS and not op.endswith("-done"):
        operands = line[match.end() :].split(")")[0]
        whole = sum(sizes(operands)) if kind == "reduce-scatter" else _whole(shape, op)
        if within and any(len({device // within for device in group}) > 1 for group in groups(line)):
          kind += SLICES
        _count(found.setdefault(kind, [0, 0, 0]), times, whole)
        continue
      crossing = _HOST.search(line) if op == "recv" else None
      if crossing:
        kind = crossing[1].lower().replace("_", "-") + SLICES
        _count(found.setdefault(kind, [0, 0, 0]), times, max(sizes(shape)))
        continue
      trips = 1
      if op == "while":
        trips = _trips(line, bodies)
        unknown += trips is None
      if op not in ("reduce", "scatter", "sort", "reduce-window", "map"):
        branches = [name.strip(" %") for group in _BRANCHES.findall(line) for name in group.split(",")]
        for called in (*_CALLED.findall(line), *branches):
          walk(called, times * (trips or 1))

  walk(entry, 1)
  return {kind: Collective(*numbers) for kind, numbers in sorted(found.items())}, unknown


def travelled(found: dict[str, Collective]) -> float:
  """Bytes that a device receives within its slice in one call of the program."""
  return sum(TRAVEL[kind] * collective.bytes for kind, collective in found.items() if not kind.endswith(SLICES))


def crossed(found: dict[str, Collective], slices: int) -> float:
  """Bytes that a device receives from other slices in one call of the program, if these form a ring."""
  share = (slices - 1) / slices
  each = {kind.removesuffix(SLICES): made for kind, made in found.items() if kind.endswith(SLICES)}
  return sum(TRAVEL[kind] * share * collective.bytes for kind, collective in each.items())


def _count(numbers: list[int], times: int, size: int) -> None:
  numbers[:] = numbers[0] + 1, numbers[1] + times, numbers[2] + times * size


def _whole(shape: str, op: str) -> int:
  """Bytes of a collective's result. An asynchronous start gives its operands too: of these pairs the larger."""
  every = sizes(shape)
  return max(every, default=0) if op.endswith("-start") and op != "all-reduce-start" else sum(every)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """(name -> lines of each computation, name of the entry)."""
  bodies: dict[str, list[str]] = {}
  entry = name = ""
  for line in text.splitlines():
    match = _COMPUTATION.match(line)
    if match:
      name = match[2]
      bodies[name] = []
      entry = name if match[1] else entry
    elif name:
      bodies[name].append(line)
  return bodies, entry


def _trips(line: str, bodies: dict[str, list[str]]) -> int | None:
  """How often a loop runs: XLA's word for it, or the only bound that its condition compares with, over its step."""
  known = _KNOWN.search(line)
  if known:
    return int(known[1])
  condition, body = (re.search(rf"{part}=%?([\w.\-]+)", line) for part in ("condition", "body"))
  lines = bodies.get(condition[1], []) if condition else []
  limits = [int(found[1]) for found in map(_LIMIT.search, lines) if found]
  if len(limits) != 1 or not any("direction=LT" in line for line in lines):
    return None
  return -(-limits[0] // _step(lines, bodies.get(body[1], []) if body else []))


def _step(condition: list[str], body: list[str]) -> int:
  """What a loop adds to its counter in a trip: more than 1 where XLA has unrolled it; 1 if that cannot be seen."""
  made = {found[1]: line for line in body if (found := _INSTRUCTION.match(line))}
  places = [found[1] for line in condition if (found := re.search(r"get-tuple-element\(.*index=(\d+)", line))]
  root = next((line for line in body if line.lstrip().startswith("ROOT")), "")
  returned = _operands(root)
  if len(places) != 1 or int(places[0]) >= len(returned):
    return 1
  added = [_LIMIT.search(made.get(name, "")) for name in _operands(made.get(returned[int(places[0])], ""))]
  return max([int(found[1]) for found in added if found], default=1) or 1


def _operands(line: str) -> list[str]:
  """Names of an instruction's operands."""
  match = _INSTRUCTION.match(line)
  return re.findall(r"%([\w.\-]+)", line[match.end() :].split(")")[0]) if match else []
