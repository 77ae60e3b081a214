"""WHEN a thought ends.

A rule reads off the drawn think tokens how many of the n are used. Shapes are static: what comes after the end is
masked in training (nothing later sees it, it is not scored, it costs no price), and decoding really stops there.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp


def fixed(tokens_Xn, stop: int):
  """Every thought uses all of its think tokens. Returns used_X, int32."""
  del stop
  return jnp.full(tokens_Xn.shape[:-1], tokens_Xn.shape[-1], jnp.int32)


def stop(tokens_Xn, stop: int):
  """A thought ends where it draws the STOP row, which does not count as a think token; used_X is 0 ... n, int32.

  STOP is one more token of the policy: the policy gradient pays for stopping as for any other token. A thought that
  never draws it is closed after n tokens.
  """
  n = tokens_Xn.shape[-1]
  return jnp.min(jnp.where(tokens_Xn == stop, jnp.arange(n), n), axis=-1, initial=n).astype(jnp.int32)


class Rule(NamedTuple):
  """used: (tokens_Xn, STOP row) -> used_X. draws: STOP is among the tokens that may be drawn, and closes a thought."""

  used: Callable
  draws: bool


HALTING = dict(fixed=Rule(fixed, draws=False), stop=Rule(stop, draws=True))
