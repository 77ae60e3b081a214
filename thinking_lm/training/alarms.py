"""Follows rules through the rows of a run, and says once when one is broken and once when it holds again.

Everything that is known here derives from the rows of `metrics.jsonl`: a run that is started again reads them and goes
on as if it had not stopped.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from absl import logging

from thinking_lm.errors import DivergedError

KEPT = 100
"""Latest readings of a number that measures can look at."""


class Rule(Protocol):
  """See `objectives.health.Rule`."""

  reads: Sequence[str]
  low: float | None
  high: float | None
  advice: str
  stops: bool

  def measure(self, histories: Mapping[str, Any]) -> float: ...

  def broken(self, measured: float) -> bool: ...


class Watch:
  """Takes rows; raises alarms after `patience` readings in a row beyond a threshold.

  Args:
    rules: by name. history: (first, recent tuple) -> what the rules' measures read.
  """

  def __init__(self, rules: Mapping[str, Rule], history, patience: int):
    self._rules, self._history, self._patience = rules, history, patience
    self._readings: dict[str, Any] = {}
    self._broken = dict.fromkeys(rules, 0)
    self._reads = {name for rule in rules.values() for name in rule.reads}

  def replay(self, rows: Sequence[Mapping[str, Any]]) -> None:
    """Takes in what an earlier attempt has written, without saying it again."""
    for row in rows:
      self._take(row)

  def __call__(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
    """Takes a row in and says what changed; {alarm_NAME: 1 or 0} of the rules that began or ceased to be broken.

    Raises:
      DivergedError: a rule that stops the run is broken.
    """
    changed = {}
    for name, (measured, before, now) in self._take(values).items():
      rule = self._rules[name]
      if now and not before:
        bound = "no number"
        if rule.low is not None and measured < rule.low:
          bound = f"below {rule.low:g}"
        elif rule.high is not None and measured > rule.high:
          bound = f"above {rule.high:g}"
        text = (
          f"{name} at step {step}: {', '.join(rule.reads)} measure {measured:.3g}, {bound}, for {self._patience} "
          f"readings in a row; {rule.advice} (health.{name})"
        )
        if rule.stops:
          raise DivergedError(text)
        logging.warning("%s", text)
        changed[f"alarm_{name}"] = 1.0
      elif before and not now:
        logging.warning("%s at step %d: is over (%.3g)", name, step, measured)
        changed[f"alarm_{name}"] = 0.0
    return changed

  def _take(self, values) -> dict[str, tuple[float, bool, bool]]:
    """name -> (measured, broken before, broken now) of the rules that had something new to read."""
    fresh = {name: values[name] for name in self._reads & values.keys()}
    for name, reading in fresh.items():
      reading = float("nan") if reading is None else float(reading)
      first, recent = self._readings.get(name, self._history(reading, ()))
      self._readings[name] = self._history(first, (*recent, reading)[-KEPT:])
    found = {}
    for name, rule in self._rules.items():
      if fresh.keys() & set(rule.reads) and self._readings.keys() >= set(rule.reads):
        measured = rule.measure(self._readings)
        before = self._broken[name] >= self._patience
        self._broken[name] = self._broken[name] + 1 if rule.broken(measured) else 0
        found[name] = (measured, before, self._broken[name] >= self._patience)
    return found
