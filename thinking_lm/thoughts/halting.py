"""WHEN a thought ends.

A rule says, for each anchor, how many of the n think tokens are used. Shapes are static: unused tokens are masked, and
real savings are the decoder's to make.
"""

import jax.numpy as jnp


def fixed(length: int, valid_BGN):
  """Every thought uses all n of its think tokens. Returns used_BGN, int32 (0 where there is no anchor)."""
  return jnp.where(valid_BGN, length, 0).astype(jnp.int32)


HALTING = dict(fixed=fixed)
