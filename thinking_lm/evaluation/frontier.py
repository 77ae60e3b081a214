"""The frontier of several evaluated runs: how well they predict against how much they think."""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from thinking_lm.errors import ConfigError, DataError
from thinking_lm.evaluation.summary import aligned, text


class Point(NamedTuple):
  """One evaluation: its run and what `--thought` changed, how it thinks, think tokens per target, and the reference's
  [value, low, high] of each.
  """

  run: str
  settings: str
  think: float
  nats: Sequence[float | None]
  accuracy: Sequence[float | None] | None


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
    if price := config["objective"]["price"]:
      settings += f" price {price:g}"
    think = values["think_tokens"] / max(arm["targets"], 1)
    return Point(path.name + changes, settings, think, arm["nats_per_token"], arm["accuracy"])
  except (ValueError, KeyError, OSError) as error:
    raise DataError(f"{file} or the config of its run is not what `evaluate` leaves: {error!r}") from error


def best(points: Sequence[Point]) -> list[bool]:
  """Which points no other one beats in think tokens or nats without losing in the other; NaN and null never are."""
  key = lambda point: (point.think, float("inf") if point.nats[0] is None else point.nats[0])

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
