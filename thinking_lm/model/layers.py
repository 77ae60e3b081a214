"""The pieces of a decoder layer: linear maps, RMSNorm, rotary positions and attention over several sets of keys."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

MASKED = -1e30
"""Score of a key that a query may not see: finite, so that a row that sees nothing is defined rather than NaN."""


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


def rotate(x, positions, base: float):
  """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), pairs taken half a head apart.

  Args:
    x: [..., heads, E], E even. positions: [...] integers. base: the longest wave length is about 2 pi base.
  """
  half = x.shape[-1] // 2
  frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions.astype(jnp.float32)[..., None, None] * frequency
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Keys(NamedTuple):
  """One set of keys and values for attention, and who may see them.

  k, v: [B, S, K, E] when all P streams share them, [B, P, S, K, E] when each stream has its own.
  mask_BPQS: bool, True where the query sees the key; B, P and Q may be 1.
  """

  k: jax.Array
  v: jax.Array
  mask_BPQS: jax.Array


def attention(q_BPQHE, sets: Sequence[Keys]):
  """Softmax attention over the union of several sets of keys, as one softmax.

  Scores of all sets are concatenated before the softmax, never merged afterwards by their log-sum-exp: the usual
  kernels return a log-sum-exp that is not differentiable, which makes such a merge right forward and wrong backward.
  Query head h reads key-value head h // (H / K). Scores and softmax are float32.

  Returns [B, P, Q, H, E] in the type of q.
  """
  B, P, Q, H, E = q_BPQHE.shape
  K = sets[0].k.shape[-2]
  q = (q_BPQHE * E**-0.5).reshape(B, P, Q, K, H // K, E)
  scores = []
  for keys in sets:
    equation = "bpqkre,bske->bpkrqs" if keys.k.ndim == 4 else "bpqkre,bpske->bpkrqs"
    score = jnp.einsum(equation, q, keys.k, preferred_element_type=jnp.float32)
    scores.append(jnp.where(keys.mask_BPQS[:, :, None, None], score, MASKED))
  weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q.dtype)
  out, start = 0.0, 0
  for keys in sets:
    equation = "bpkrqs,bske->bpqkre" if keys.v.ndim == 4 else "bpkrqs,bpske->bpqkre"
    part = weights[..., start : start + keys.k.shape[-3]]
    out += jnp.einsum(equation, part, keys.v, preferred_element_type=jnp.float32)
    start += keys.k.shape[-3]
  return out.astype(q.dtype).reshape(B, P, Q, H, E)
