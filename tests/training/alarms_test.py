"""Alarms over time: they need patience, are said once, end, stop a run where they should, and survive a restart."""

import logging
from typing import NamedTuple

import pytest

from thinking_lm.errors import DivergedError
from thinking_lm.training.alarms import Watch


class History(NamedTuple):
  """As in objectives.health."""

  first: float
  recent: tuple


class Rule(NamedTuple):
  """x must not rise above 1."""

  reads: tuple = ("x",)
  low: float | None = None
  high: float | None = 1.0
  advice: str = "lower x"
  stops: bool = False

  def measure(self, histories):
    """The newest x less the first one."""
    return histories["x"].recent[-1] - histories["x"].first

  def broken(self, measured):
    """Above the bound, or no number."""
    return not measured <= self.high


def watch(**changes):
  """One rule, two readings of patience."""
  return Watch(dict(climb=Rule(**changes)), History, 2)


ROWS = [dict(x=x) for x in (5.0, 5.5, 7.0, 5.0, 7.0, 7.0, 7.0, 5.0, 7.0, None, 7.0)]
SAID = {5: dict(alarm_climb=1.0), 7: dict(alarm_climb=0.0), 9: dict(alarm_climb=1.0)}


def test_an_alarm_needs_patience_is_said_once_and_ends():
  watching = watch()
  assert {step: said for step, row in enumerate(ROWS) if (said := watching(step, row))} == SAID


def test_other_rows_do_not_count_as_readings():
  watching = watch()
  assert [watching(step, row) for step, row in enumerate([dict(x=1.0), dict(x=9.0), dict(y=1.0)])] == [{}, {}, {}]
  assert watching(3, dict(x=9.0)) == dict(alarm_climb=1.0)


@pytest.mark.parametrize("cut", range(len(ROWS)))
def test_a_restart_goes_on_as_if_nothing_had_happened(cut, caplog):
  with caplog.at_level(logging.WARNING):
    again = watch()
    again.replay(ROWS[:cut])
    assert not caplog.records
  rest = {step: said for step, row in enumerate(ROWS) if step >= cut and (said := again(step, row))}
  assert rest == {step: said for step, said in SAID.items() if step >= cut}


def test_a_rule_that_stops_ends_the_run_with_its_exit_code():
  watching = watch(stops=True)
  watching(0, dict(x=0.0))
  watching(1, dict(x=3.0))
  with pytest.raises(DivergedError, match=r"climb at step 2: x measure 3, above 1, for 2 readings.*lower x") as caught:
    watching(2, dict(x=3.0))
  assert caught.value.exit_code == 70
