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


def attention(q_BPQHE, sets: Sequence[Keys], blocks: int = 1):
  """Softmax attention over the union of several sets of keys, as one softmax.

  Two parts are never merged afterwards by their log-sum-exp: the usual kernels return one that is not differentiable,
  which makes such a merge right forward and wrong backward. Here all sets share one maximum and one denominator, and
  the division comes last. Query head h reads key-value head h // (H / K). Scores and softmax are float32.

  Args:
    sets: the last one holds the keys of the queries themselves, of which a query never sees a later one.
    blocks: of queries, where there is one stream: each leaves out the keys after it, so that (1 + 1 / blocks) / 2 of
      the work on the last set is done.

  Returns [B, P, Q, H, E] in the type of q.
  """
  P, Q = q_BPQHE.shape[1:3]
  if blocks == 1 or P > 1 or 2 * blocks > Q:
    return _attention(q_BPQHE, sets)
  size, mixed = -(-Q // blocks), []
  for start in range(0, Q, size):
    rows = slice(start, start + size)
    seen = [keys._replace(mask_BPQS=_rows(keys.mask_BPQS, rows)) for keys in sets]
    mixed.append(_attention(q_BPQHE[:, :, rows], [*seen[:-1], _first(seen[-1], rows.stop)]))
  return jnp.concatenate(mixed, axis=2)


def _rows(mask_BPQS, rows: slice):
  return mask_BPQS if mask_BPQS.shape[2] == 1 else mask_BPQS[:, :, rows]


def _first(keys: Keys, count: int) -> Keys:
  return Keys(keys.k[..., :count, :, :], keys.v[..., :count, :, :], keys.mask_BPQS[..., :count])


def _attention(q_BPQHE, sets):
  """One block of queries. Heads come first, so that every product is a plain batch of matrices."""
  B, P, Q, H, E = q_BPQHE.shape
  K = sets[0].k.shape[-2]
  q_BKPQRE = (q_BPQHE * E**-0.5).reshape(B, P, Q, K, H // K, E).transpose(0, 3, 1, 2, 4, 5)

  def product(left_BKPQRX, right, contract):
    """Over the last axis of `left`, with [B, (P,) S, K, E]: over its E gives scores, over its S mixed values."""
    *edge, X = left_BKPQRX.shape
    if right.ndim == 5 and P == 1:
      right = right[:, 0]
    shared = right.ndim == 4
    right = jnp.moveaxis(right, -2, 1)
    left = left_BKPQRX.reshape(B, K, -1, X) if shared else left_BKPQRX.reshape(B, K, P, -1, X)
    equation = dict(keys="...mx,...sx->...ms", values="...mx,...xe->...me")[contract]
    y = jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)
    return y.reshape(*edge, y.shape[-1])

  scores = []
  for keys in sets:
    score_BKPQRS = product(q_BKPQRE, keys.k, "keys")
    scores.append(jnp.where(keys.mask_BPQS[:, None, :, :, None], score_BKPQRS, MASKED))
  largest = jnp.max(jnp.stack([jnp.max(score, axis=-1) for score in scores]), axis=0)
  # A softmax does not depend on what is subtracted, and so neither does its gradient.
  weights = [jnp.exp(score - jax.lax.stop_gradient(largest)[..., None]) for score in scores]
  total = sum(jnp.sum(weight, axis=-1) for weight in weights)
  parts = (product(weight.astype(q_BPQHE.dtype), keys.v, "values") for weight, keys in zip(weights, sets, strict=True))
  mixed_BKPQRE = sum(parts) / total[..., None]
  return mixed_BKPQRE.astype(q_BPQHE.dtype).transpose(0, 2, 3, 1, 4, 5).reshape(B, P, Q, H, E)
