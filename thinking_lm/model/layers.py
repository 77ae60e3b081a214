"""The pieces of a decoder layer but for attention: linear maps, RMSNorm and rotary positions."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


def matmul(x, w_IO):
  """x @ w in x's type, accumulated in float32. Leading axes are folded into one.

  XLA's CPU backend has a slow backward for a matrix product with more than one leading axis, and reaches its fast
  bfloat16 kernels only with a float32 result.
  """
  y = jnp.dot(x.reshape(-1, x.shape[-1]), w_IO.astype(x.dtype), preferred_element_type=jnp.float32)
  return y.astype(x.dtype).reshape(*x.shape[:-1], w_IO.shape[-1])


def parameter(rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str | None], scale: float) -> nnx.Param:
  """A float32 parameter drawn from N(0, scale^2), with the logical name of each axis."""
  init = nnx.with_partitioning(nnx.initializers.normal(scale), tuple(axes), eager_sharding=False)
  return nnx.Param(init(rngs.params(), tuple(shape), jnp.float32))


class RMSNorm(nnx.Module):
  """x / rms(x) * scale over the last axis, computed in float32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

  def __init__(self, width: int, axis: str | None):
    init = nnx.with_partitioning(nnx.initializers.ones_init(), (axis,), eager_sharding=False)
    self.scale = nnx.Param(init(None, (width,), jnp.float32))

  def __call__(self, x):
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
    return (y * self.scale[...]).astype(x.dtype)


def rotary(positions, width: int, base: float):
  """(sin, cos) [..., 1, E / 2] of the rotary angles at positions [...], for `rotate`: the same for heads and layers.

  Args:
    positions: integers. width: E, even. base: the longest wave length is about 2 pi base.
  """
  frequency = base ** (-jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
  angle = positions.astype(jnp.float32)[..., None, None] * frequency
  return jnp.sin(angle), jnp.cos(angle)


def rotate(x, turn):
  """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of x [..., heads, E], pairs taken half a head apart.

  turn: as of `rotary`.
  """
  sin, cos = turn
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
