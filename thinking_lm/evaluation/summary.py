"""An Evaluation as JSON values, and those as a table for people."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from thinking_lm.evaluation import calibration, difficulty
from thinking_lm.evaluation.controls import NONE
from thinking_lm.evaluation.evaluators import Arm, Evaluation, RowSums
from thinking_lm.evaluation.intervals import Interval, ratio, share, wilson

INTERVALS = (
  "95 %, rows are the units; means and paired differences: normal, of the linearised ratio; accuracies: Wilson, at the "
  "number of labels divided by their design effect"
)


def summarise(found: Evaluation, tagging: bool, task: bool) -> dict[str, Any]:
  """Means and intervals of everything, as JSON values.

  `minus_reference`: the arm's nats minus those of the reference on the same targets; above 0 where the reference
  predicts better. `minus_none`, of K draws: the same against the model without thoughts. An interval is [value, low,
  high]; null where nothing was counted, bounds null where only one row was.

  tagging: accuracy is also given by position. task: there are whole examples.
  """
  return dict(
    split=found.split,
    rows=len(found.ids_R),
    thoughts=found.anchors,
    thoughts_dropped=found.dropped,
    residual=found.residual,
    real_tokens=found.real_tokens,
    think_tokens=found.think_tokens,
    intervals=INTERVALS,
    reference=found.reference,
    arms={name: _arm(arm, found, task) for name, arm in found.arms.items()},
    draws={str(k): _draws(found, k) for k in found.draws},
    positions={name: _positions(arm) for name, arm in found.arms.items()} if tagging else None,
    calibration=calibration.summarise(found.calibration),
    difficulty=None if found.difficulty is None else difficulty.summarise(found.difficulty),
    generated=_generated(found.generated),
    omitted=dict(found.omitted),
    seconds={part: dict(first_batch=first, other_batches=rest) for part, (first, rest) in found.seconds.items()},
  )


def _arm(arm: Arm, found: Evaluation, task: bool) -> dict[str, Any]:
  sums, less = arm.sums, arm.reference
  difference_R = sums.nats_R - less.nats_R
  everything = found.arms[found.reference].sums.count_R.sum()
  kept = sums.count_R > 0
  values = dict(
    nats_per_token=ratio(sums.nats_R[kept], sums.count_R[kept]),
    bits_per_byte=_bits(sums.nats_R[kept], sums.bytes_R[kept]),
    minus_reference=ratio(difference_R[kept], sums.count_R[kept]),
    minus_reference_bits_per_byte=_bits(difference_R[kept], sums.bytes_R[kept]),
    accuracy=share(sums.hits_R, sums.labels_R),
    accuracy_of_reference=share(less.hits_R, less.labels_R),
    whole_examples=_whole(sums) if task else None,
  )
  return {name: _json(value) for name, value in values.items()} | dict(
    targets=float(sums.count_R.sum()),
    targets_excluded=float(everything - sums.count_R.sum()),
    rows=int(kept.sum()),
    thoughts_changed=arm.changed,
  )


def _bits(nats_R, bytes_R) -> Interval | None:
  return ratio(nats_R / math.log(2), bytes_R)


def _whole(sums: RowSums) -> Interval | None:
  number = int((sums.labels_R > 0).sum())
  return wilson(float(sums.whole_R.sum()) / number, number) if number else None


def _draws(found: Evaluation, k: int) -> dict[str, Any]:
  reference, draws = found.arms[found.reference].sums, found.draws[k]
  values = dict(
    nats_per_token=ratio(draws.marginal_R, reference.count_R),
    bits_per_byte=_bits(draws.marginal_R, reference.bytes_R),
    expected_nats_per_token=ratio(draws.expected_R, reference.count_R),
    minus_none=None,
  )
  if NONE in found.arms:
    values["minus_none"] = ratio(draws.marginal_R - found.arms[NONE].sums.nats_R, reference.count_R)
  return {name: _json(value) for name, value in values.items()}


def _positions(arm: Arm) -> list[float | None]:
  return [float(hits / labels) if labels else None for hits, labels in zip(arm.hits_T, arm.labels_T, strict=True)]


def _generated(scores: np.ndarray | None) -> dict[str, Any] | None:
  if scores is None:
    return None
  whole = wilson(float((scores == 1).mean()), len(scores))
  return dict(score=_json(ratio(scores, np.ones(len(scores)))), whole_examples=_json(whole))


def _json(interval: Interval | None) -> list[float | None] | None:
  if interval is None:
    return None
  return [None if x is None or not math.isfinite(x) else float(x) for x in interval]


def file_name(split: str, step: int, averaged: bool, data: str, trained_on: str) -> str:
  """What a result's files are called, without an ending; those on other data than the run's (by digest) otherwise."""
  return f"{split}-{step}" + averaged * "-averaged" + (data != trained_on) * f"-data-{data[:8]}"


def table(summary: Mapping[str, Any], positions: bool = False) -> str:
  """The summary in aligned columns: [low, high] is the interval of the value before it."""
  reference = summary["reference"]
  rows = [("thoughts", "nats/token", "bits/byte", f"minus {reference}", "accuracy", "whole", "rows", "targets")]
  for name, arm in summary["arms"].items():
    less = arm["minus_reference"] if name != reference else None
    columns = (arm["nats_per_token"], arm["bits_per_byte"], less, arm["accuracy"], arm["whole_examples"])
    rows.append((name, *map(text, columns), str(arm["rows"]), f"{arm['targets']:g}"))
  blocks = [aligned(rows)]
  if summary["draws"]:
    rows = [("draws", "log-mean-exp, nats/token", "bits/byte", "minus none", "mean log, nats/token")]
    for k, draws in summary["draws"].items():
      columns = ("nats_per_token", "bits_per_byte", "minus_none", "expected_nats_per_token")
      rows.append((f"K = {k}", *(text(draws[column]) for column in columns)))
    blocks.append(aligned(rows))
  if summary["generated"]:
    rows = [("generated", "score", "whole"), ("answers", *map(text, summary["generated"].values()))]
    blocks.append(aligned(rows))
  blocks += _calibration(summary["calibration"])
  if summary["difficulty"]:
    blocks.append(_difficulty(summary["difficulty"]))
  if positions and summary["positions"]:
    names = list(summary["positions"])
    by_T = zip(*summary["positions"].values(), strict=True)
    rows = [(str(t), *("-" if x is None else f"{x:.3f}" for x in row)) for t, row in enumerate(by_T)]
    blocks.append(aligned([("accuracy at", *names), *rows]))
  notes = [f"{name} left out: {reason}" for name, reason in summary["omitted"].items()]
  if summary["thoughts_dropped"]:
    notes.append(
      f"{summary['thoughts_dropped']} thoughts found no room in their rows and are left out: see thought.room"
    )
  if summary["residual"] is not None:
    notes.append(
      f"residual {summary['residual']:.2e}: what one more parallel iteration would still change in a thought, as a "
      "share of its norm"
    )
  return "\n\n".join([*blocks, "\n".join(notes)] if notes else blocks)


def _difficulty(values: Mapping[str, Any]) -> str:
  """How hard, how long, how well."""
  rows = [("difficulty", "answers", "think tokens", "accuracy")]
  for one in values["levels"]:
    rows.append((f"{one['level']:g}", str(one["answers"]), f"{one['used']:.2f}", text(one["accuracy"])))
  value = values["correlation"]
  said = "none: one of them is the same for all rows" if value[0] is None else text(value)
  return f"{aligned(rows)}\nrank correlation of think tokens with difficulty: {said}"


def _calibration(values: Mapping[str, Any] | None) -> list[str]:
  """Forecasters, and what is said against what is done, as blocks of the table."""
  if values is None:
    return []
  heads = ("= reliability", "- resolution", "+ uncertainty", "+ within", "mean forecast", "came true")
  rows = [(f"top label, {values['bins']} bins", "ECE", "Brier", *heads)]
  for name, found in values["forecasters"].items():
    parts = ("reliability", "resolution", "uncertainty", "within", "forecast", "accuracy")
    rows.append((name, text(found["ece"]), text(found["brier"]), *(f"{found[part][0]:.4f}" for part in parts)))
  blocks = [aligned(rows)]
  if values["gap"]:
    gap = [text(values["gap"][part]) for part in ("named", "variation")]
    blocks.append(aligned([("said - done", "|difference|, named tokens", "total variation"), ("", *gap)]))
  return blocks


def text(interval: Sequence[float | None] | None) -> str:
  """`value [low, high]`, or why there is none."""
  if interval is None:
    return "-"
  value, low, high = interval
  if value is None:
    return "not finite"
  return f"{value:.4f}" if low is None or high is None else f"{value:.4f} [{low:.4f}, {high:.4f}]"


def aligned(rows: Sequence[Sequence[str]]) -> str:
  """Rows of cells as lines of aligned columns."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows)
