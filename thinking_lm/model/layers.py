"""The pieces of a decoder layer but for attention: linear maps, RMSNorm and rotary positions."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

MATMUL = "matmul"
"""The name that `jax.checkpoint` knows the results of `matmul` by: it cannot look into `product`."""


def matmul(x, w_IO):
  """x @ w [..., O] of x [..., I], in x's type, accumulated in float32. Leading axes are folded into one.

  XLA's CPU backend has a slow backward for a matrix product with more than one leading axis.
  """
  y = product("ni,io->no", x.reshape(-1, x.shape[-1]), w_IO.astype(x.dtype))
  return checkpoint_name(y.astype(x.dtype), MATMUL).reshape(*x.shape[:-1], w_IO.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(equation: str, left, right):
  """`jnp.einsum` of two arrays of one type, in float32; an axis of one is an axis of the other or of the result.

  The cotangent is rounded to that type before it is multiplied, as the factors were: in float32 it would make either
  gradient a product of two types. A TPU would round it all the same and read twice the bytes, and XLA's CPU backend
  reaches its fast bfloat16 kernels only where both factors are bfloat16 and the result is float32.
  """
  return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _product_backward(equation, factors, dy):
  (left, right), dy = factors, dy.astype(factors[0].dtype)
  of_left, of_right, of_y = equation.replace("->", ",").split(",")
  dleft = product(f"{of_y},{of_right}->{of_left}", dy, right)
  dright = product(f"{of_left},{of_y}->{of_right}", left, dy)
  return dleft.astype(left.dtype), dright.astype(right.dtype)


product.defvjp(lambda equation, *factors: (product(equation, *factors), factors), _product_backward)


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
