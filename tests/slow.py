"""Which cases `make test` leaves to `make test-slow`."""

from collections.abc import Iterable

import pytest


def leaving(cases: Iterable, slow: Iterable) -> list:
  """The cases for `parametrize`, those in `slow` marked: each is near another one, or a longer loop of it.

  A tuple has the values of several arguments.
  """
  cases, slow = list(cases), list(slow)
  assert all(case in cases for case in slow), "a case that is left out must be one"
  values = lambda case: case if isinstance(case, tuple) else (case,)
  return [pytest.param(*values(case), marks=pytest.mark.slow) if case in slow else case for case in cases]
