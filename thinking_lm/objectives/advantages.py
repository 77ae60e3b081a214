"""What of a reward multiplies grad log pi: the reward less a baseline. Pure functions of reward_BGN along G.

The score term of the objective is sum_g A_g log pi(z_g) / G, so an advantage has the unit of its reward unless said
otherwise. To add one, write the function and its line in the table; its claims are tested both ways by enumeration.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

STD_FLOOR = 1e-3
"""Standard deviation of a group, in the reward's unit, below which it is not divided by: its thoughts made no
difference worth the name, and dividing would blow rounding up to the size of a signal. objective.std_floor sets
another one: this is for nats, and probabilities of unlikely outcomes differ by less."""


def none(reward_BGN):
  """A_g = r_g (REINFORCE without a baseline, Williams 1992)."""
  return reward_BGN


def mean(reward_BGN):
  """A_g = r_g - mean_j r_j, g included.

  The baseline knows z_g, which shrinks the expected gradient by (G - 1) / G and does nothing else. Also Dr. GRPO's (Liu
  et al. 2025, arXiv:2503.20783): GRPO without the division by the group's standard deviation, nor by the response's
  length, by which no member here divides (a thought's log-probability is a sum over its tokens). Being (G - 1) / G of
  leave_one_out is the paper's own; its constant number of tokens is here the number of targets.
  """
  return reward_BGN - reward_BGN.mean(axis=1, keepdims=True)


def leave_one_out(reward_BGN):
  """A_g = r_g - mean of r_j over j != g (Kool et al. 2019; RLOO, Ahmadian et al. 2024, arXiv:2402.14740)."""
  G = reward_BGN.shape[1]
  return (G * reward_BGN - reward_BGN.sum(axis=1, keepdims=True)) / (G - 1)


def rlp(reward_BGN):
  """A_g = G / (G - 1) (r_g - mean_j r_j): the same numbers as leave_one_out (RLP, arXiv:2510.01265)."""
  G = reward_BGN.shape[1]
  return G / (G - 1) * mean(reward_BGN)


def grpo(reward_BGN, floor=STD_FLOOR):
  """A_g = (r_g - mean) / max(std, floor), of the group, std with 1 / G; no unit (GRPO, arXiv:2402.03300).

  The paper divides by the standard deviation as it is, and averages over a response's tokens where we sum. Biased: a
  group counts the more, the more its thoughts agree.
  """
  return mean(reward_BGN) / jnp.maximum(reward_BGN.std(axis=1, keepdims=True), floor)


def quiet_star(reward_BGN):
  """A_g = max(r_g - mean_j r_j, 0): good thoughts are repeated, bad ones not avoided (arXiv:2403.09629). Biased."""
  return jnp.maximum(mean(reward_BGN), 0)


def less(reward_BGN, baseline):
  """A_g = r_g - b, where b knows nothing of z_g. Works for G = 1.

  running_mean: b is the mean reward of earlier steps (carry.py). value: what the value head expects after x alone.
  greedy: the reward of the same model's greedy thought, which is not drawn (ReMax, Li et al. 2023, arXiv:2310.10505).
  """
  return reward_BGN - baseline


def varied(reward_BGN, floor=STD_FLOOR):
  """keep_BN: the group's standard deviation is above the floor (DAPO's dynamic sampling, arXiv:2503.14476).

  DAPO draws on until its batch is full of such groups; with a fixed batch the others leave it, and what is left is
  averaged over less.
  """
  return reward_BGN.std(axis=1) > floor


def log_mean_exp(value_BGX):
  """log 1/G sum_g exp(value_g), along axis 1."""
  return jax.nn.logsumexp(value_BGX, axis=1) - jnp.log(value_BGX.shape[1])


def _in_place_of_own(reward_BGN, own_BGN):
  """logsumexp_j of the group in which r_g is replaced by own_g, for each g."""
  G = reward_BGN.shape[1]
  group_BHGN = jnp.where(jnp.eye(G, dtype=bool)[:, :, None], own_BGN[:, :, None], reward_BGN[:, None])
  return jax.nn.logsumexp(group_BHGN, axis=2)


def vimco(reward_BGN):
  """A_g = G (L - log 1/G (sum_{j != g} p_j + p'_g)), L = log 1/G sum_j p_j, log p'_g = mean of log p_j over j != g.

  p = exp(reward) is the probability of the outcome, L the bound M: what z_g adds to it over a sample of the others'
  geometric mean (Mnih & Rezende 2016, arXiv:1602.06725). Their score term is a sum over g, ours a mean, hence the G.
  """
  G = reward_BGN.shape[1]
  others_BGN = (reward_BGN.sum(axis=1, keepdims=True) - reward_BGN) / (G - 1)
  return G * (jax.nn.logsumexp(reward_BGN, axis=1, keepdims=True) - _in_place_of_own(reward_BGN, others_BGN))


def jepo(reward_BGN):
  """A_g = G (L - log 1/(G-1) sum_{j != g} p_j), with p and L as for vimco (JEPO, Tang et al. 2025, arXiv:2503.19618).

  Their section 4: the score term sum_g (L - v_g) grad log pi(z_g), v_g the leave-one-out bound; hence the G, as for
  vimco. Their experiments (appendix B.2) use (1/G) sum_g clip((L - v_g) / std, -1, 1) in its place, which is biased.
  """
  without_BGN = _in_place_of_own(reward_BGN, jnp.full_like(reward_BGN, -jnp.inf)) - jnp.log(reward_BGN.shape[1] - 1)
  return reward_BGN.shape[1] * (log_mean_exp(reward_BGN)[:, None] - without_BGN)


class Advantage(NamedTuple):
  """A member of the table and its claims.

  of: reward_BGN -> advantage_BGN; with a baseline: (reward_BGN, baseline) -> advantage_BGN.
  unbiased: the expected score gradient is that of E r, or for a member of bound M that of E L for the same G.
  needs: the smallest G for which it is defined.
  scale: G -> expected score gradient / that of E r, where this is a number; None where its direction is another.
  bound: "M" if its reward must be an outcome and it credits the bound M; None if it takes any reward.
  keep: (reward_BGN, floor) -> keep_BN, the groups that stay in the batch; None keeps all.
  linear: A_g is r_g less a baseline of the others, so that what is subtracted from r_g may be added back elsewhere.
  baseline: the member of baselines.BASELINES that `of` is given; None for what needs the group only.
  floored: `of` takes the floor of a group's standard deviation too, as floor=.
  """

  of: Callable
  unbiased: bool
  needs: int
  scale: Callable | None = None
  bound: str | None = None
  keep: Callable | None = None
  linear: bool = False
  baseline: str | None = None
  floored: bool = False


ADVANTAGES = dict(
  none=Advantage(none, unbiased=True, needs=1, scale=lambda G: 1.0, linear=True),
  mean=Advantage(mean, unbiased=False, needs=2, scale=lambda G: (G - 1) / G),
  leave_one_out=Advantage(leave_one_out, unbiased=True, needs=2, scale=lambda G: 1.0, linear=True),
  grpo=Advantage(grpo, unbiased=False, needs=2, floored=True),
  dr_grpo=Advantage(mean, unbiased=False, needs=2, scale=lambda G: (G - 1) / G),
  rlp=Advantage(rlp, unbiased=True, needs=2, scale=lambda G: 1.0, linear=True),
  quiet_star=Advantage(quiet_star, unbiased=False, needs=2),
  dapo=Advantage(grpo, unbiased=False, needs=2, keep=varied, floored=True),
  ema=Advantage(less, unbiased=True, needs=1, scale=lambda G: 1.0, linear=True, baseline="running_mean"),
  value=Advantage(less, unbiased=True, needs=1, scale=lambda G: 1.0, linear=True, baseline="value"),
  greedy=Advantage(less, unbiased=True, needs=1, scale=lambda G: 1.0, linear=True, baseline="greedy"),
  vimco=Advantage(vimco, unbiased=True, needs=2, bound="M"),
  jepo=Advantage(jepo, unbiased=True, needs=2, bound="M"),
)
