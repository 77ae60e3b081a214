"""What of a reward multiplies grad log pi: the reward less a baseline. Pure functions of reward_BGN along G.

A member's claims are tested both ways by enumeration: `unbiased` means that the expected gradient of
sum_g A_g grad log pi(z_g) / G is that of the expected reward. `needs` is the smallest G for which it is defined.
"""

from collections.abc import Callable
from typing import NamedTuple


def none(reward_BGN):
  """A_g = r_g (REINFORCE without a baseline, Williams 1992)."""
  return reward_BGN


def leave_one_out(reward_BGN):
  """A_g = r_g - mean of r_j over j != g (Kool et al. 2019; RLOO, Ahmadian et al. 2024, arXiv:2402.14740)."""
  G = reward_BGN.shape[1]
  return (G * reward_BGN - reward_BGN.sum(axis=1, keepdims=True)) / (G - 1)


class Advantage(NamedTuple):
  """A member of the table and its claims."""

  of: Callable
  unbiased: bool
  needs: int


ADVANTAGES = dict(
  none=Advantage(none, unbiased=True, needs=1),
  leave_one_out=Advantage(leave_one_out, unbiased=True, needs=2),
)
