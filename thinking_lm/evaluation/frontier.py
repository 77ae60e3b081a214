"""The frontier of several evaluated runs: how well they predict against how much they think, one by one and by arm.

Runs that differ in nothing but their seeds (and, each, in the run it starts from or goes by) are one *arm*: its
interval is Student's over these runs, and not over the rows of a split as that of a single run.
"""

import io
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from thinking_lm.errors import ConfigError, DataError
from thinking_lm.evaluation.intervals import Interval, over_runs
from thinking_lm.evaluation.summary import aligned, text


class Point(NamedTuple):
  """One evaluation: its run and what `--thought` changed, how it thinks, think tokens per target, and the reference's
  [value, low, high] of each. arm: equal for runs that differ in their seeds only.
  """

  run: str
  settings: str
  think: float
  nats: Sequence[float | None]
  accuracy: Sequence[float | None] | None
  arm: str = ""


class Arm(NamedTuple):
  """Runs of one arm: their number, and means over them."""

  settings: str
  runs: int
  think: Interval
  nats: Interval
  accuracy: Interval | None


def read(run: str, split: str) -> list[Point]:
  """The evaluations of a split at the latest step. Raises ConfigError if there is none, DataError if one is damaged."""
  path = epath.Path(run)
  files = sorted((path / "evaluation").iterdir()) if (path / "evaluation").exists() else []
  found = [(re.fullmatch(rf"{split}-(\d+)(-.*)?\.json", file.name), file) for file in files]
  steps = [(int(match[1]), match[2] or "", file) for match, file in found if match]
  if not steps:
    raise ConfigError(
      f"{run} has no evaluation of {split!r}: python -m thinking_lm.evaluate --workdir={run} --split={split}"
    )
  return [_point(path, file, changes) for step, changes, file in steps if step == max(steps)[0]]


def _point(path: epath.Path, file: epath.Path, changes: str) -> Point:
  try:
    values, config = (json.loads(each.read_text()) for each in (file, path / "config.json"))
    arm, thought = values["arms"][values["reference"]], values["thought"]
    parts = ("placement", "topology", "kind", "length", "halting")
    settings = " ".join(str(thought[part]) for part in parts) if thought["length"] else "none"
    if thought["length"] and thought.get("proxy"):
      settings += " proxy"
    if price := config["objective"]["price"]:
      settings += f" price {price:g}"
    think = values["think_tokens"] / max(arm["targets"], 1)
    return Point(path.name + changes, settings, think, arm["nats_per_token"], arm["accuracy"], _arm(config, thought))
  except (ValueError, KeyError, OSError) as error:
    raise DataError(f"{file} or the config of its run is not what `evaluate` leaves: {error!r}") from error


def _arm(config, thought) -> str:
  """The config and the thoughts of an evaluation without what only tells runs of one arm apart."""
  plain = {name: dict(section) for name, section in config.items()} | dict(evaluated=dict(thought))
  own = (("train", "seed"), ("data", "seed"), ("train", "init_from"), ("thought", "proxy"), ("evaluated", "proxy"))
  for section, name in own:
    if name in plain.get(section, {}):
      plain[section][name] = name != "seed" and bool(plain[section][name])
  return json.dumps(plain, sort_keys=True)


def best(points: Sequence[Point | Arm]) -> list[bool]:
  """Which points no other one beats in think tokens or nats without losing in the other; NaN and null never are."""
  think = lambda point: point.think if isinstance(point, Point) else point.think.value
  key = lambda point: (think(point), float("inf") if point.nats[0] is None else point.nats[0])

  def beaten(point):
    return any(
      other != key(point) and all(a <= b for a, b in zip(other, key(point), strict=True)) for other in map(key, points)
    )

  return [point.nats[0] is not None and not beaten(point) for point in points]


def table(points: Sequence[Point]) -> str:
  """One line for each evaluation, cheapest first; a star where it is on the frontier."""
  ordered = sorted(points, key=lambda point: point.think)
  rows = [("", "run", "think/target", "nats/token", "accuracy", "thoughts")]
  for point, star in zip(ordered, best(ordered), strict=True):
    rows.append(
      ("*" if star else "", point.run, f"{point.think:.3f}", text(point.nats), text(point.accuracy), point.settings)
    )
  return aligned(rows)


def arms(points: Sequence[Point]) -> list[Arm]:
  """The arms, cheapest first. A run whose loss is not finite leaves its arm without one."""
  groups: dict[str, list[Point]] = {}
  for point in points:
    groups.setdefault(point.arm, []).append(point)
  found = []
  for group in groups.values():
    nats, accuracy = (_mean([getattr(point, name) for point in group]) for name in ("nats", "accuracy"))
    found.append(Arm(group[0].settings, len(group), over_runs([point.think for point in group]), nats, accuracy))
  return sorted(found, key=lambda arm: arm.think.value)


def _mean(values: Sequence[Sequence[float | None] | None]) -> Interval | None:
  """Over the runs of an arm; None where a run has no such number, without a value where one is not finite."""
  if any(value is None for value in values):
    return None
  if any(value[0] is None for value in values):
    return Interval(None, None, None)
  return over_runs([value[0] for value in values])


def arms_table(found: Sequence[Arm]) -> str:
  """One line for each arm, means over its runs with Student's 95 % intervals."""
  rows = [("", "runs", "think/target", "nats/token", "accuracy", "thoughts")]
  for arm, star in zip(found, best(found), strict=True):
    cells = [text(cell) for cell in (arm.think, arm.nats, arm.accuracy)]
    rows.append(("*" if star else "", str(arm.runs), *cells, arm.settings))
  return aligned(rows)


def picture(found: Sequence[Arm]) -> bytes | None:
  """A PNG of the arms, accuracy (where there is one, else nats) against think tokens; None without matplotlib."""
  try:
    from matplotlib.figure import Figure
  except ImportError:
    return None
  figure = Figure(figsize=(7, 4.5), layout="constrained")
  axes = figure.subplots()
  measure = "accuracy" if all(arm.accuracy for arm in found) else "nats"
  for arm in found:
    x, y = arm.think, getattr(arm, measure)
    if y.value is None:
      continue
    half = lambda at: None if at.low is None else [[at.value - at.low], [at.high - at.value]]
    label = f"{arm.settings} ({arm.runs})"
    axes.errorbar(x.value, y.value, xerr=half(x), yerr=half(y), marker="o", capsize=3, linestyle="", label=label)
  axes.set(xlabel="think tokens per target", ylabel=dict(accuracy="accuracy", nats="nats per token")[measure])
  axes.legend(fontsize=7)
  data = io.BytesIO()
  figure.savefig(data, format="png", dpi=120)
  return data.getvalue()
