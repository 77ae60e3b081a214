"""Attention over a union of several sets of keys as one softmax: one function, and a table of backends.

Two parts are never merged by a log-sum-exp that autodiff goes through: the usual kernels return one that is not
differentiable, which makes such a merge right forward and wrong backward. `einsum` writes the one softmax out. The
others work set by set, and their gradient is that of the whole operation (`merged`). `auto` takes the first while sets
are small and chunks beyond, so that temporaries, masks aside, grow with the queries and never with queries x keys.

Inside, heads come first: queries [B, K, P, Q, R, E] with R = H / K, keys [B, K, S, E] when all streams share them and
[B, K, P, S, E] when each has its own, so that every product is a plain batch of matrices, and shared keys are met by
the queries of all streams at once.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from thinking_lm.model.layers import product
from thinking_lm.sharding import constrain

MASKED = -1e30
"""Score of a key that a query may not see: finite, so that a row that sees nothing is defined rather than NaN."""

CHUNK = 512
"""Keys that `chunked` scores at a time."""


class Filled(NamedTuple):
  """What is read of a cache with room left: the first `count` slots of `layer`, both traced."""

  layer: jax.Array
  count: jax.Array


class Keys(NamedTuple):
  """One set of keys and values for attention, and who may see them.

  k, v: [B, S, K, E] when all P streams share them, [B, P, S, K, E] when each stream has its own; heads first inside.
  mask_BPQS: bool, True where the query sees the key; B, P and Q may be 1.
  filled: where there is one, k and v are of all layers, in C blocks of slots and heads first: [L, C, B, K, S / C, E] or
    [L, C, B, K, P, S / C, E]. Blocks in which nothing is filled are not read. To differentiate is a ValueError.
  """

  k: jax.Array
  v: jax.Array
  mask_BPQS: jax.Array
  filled: Filled | None = None


def attention(q_BPQHE, sets: Sequence[Keys], backend: str = "auto", blocks: int = 1, chunk: int = CHUNK):
  """Softmax attention over the union of several sets of keys, as one softmax.

  softmax(q k^T / sqrt(E)) v over all keys that a query sees; 0, without gradient, for a query that sees nothing. Query
  head h reads key-value head h // (H / K). Scores and softmax are float32, whatever the type of q.

  Args:
    sets: the last one holds the keys of the queries themselves, of which a query never sees a later one.
    backend: of BACKENDS; where a set has room left, all go by chunks. chunk: keys of a set that are scored at a time,
      where the backend goes by chunks.
    blocks: of queries, where there is one stream: each leaves out the keys after it, so that (1 + 1 / blocks) / 2 of
      the work on the last set is done.

  Returns [B, P, Q, H, E] in the type of q.
  """
  P, Q = q_BPQHE.shape[1:3]
  if blocks == 1 or P > 1 or 2 * blocks > Q:
    return _block(q_BPQHE, sets, backend, chunk)
  size, mixed = -(-Q // blocks), []
  for start in range(0, Q, size):
    rows = slice(start, start + size)
    seen = [keys._replace(mask_BPQS=_rows(keys.mask_BPQS, rows)) for keys in sets]
    seen[-1] = _first(seen[-1], rows.stop)
    mixed.append(_block(q_BPQHE[:, :, rows], seen, backend, chunk))
  return jnp.concatenate(mixed, axis=2)


def _rows(mask_BPQS, rows: slice):
  return mask_BPQS if mask_BPQS.shape[2] == 1 else mask_BPQS[:, :, rows]


def _first(keys: Keys, count: int) -> Keys:
  return Keys(keys.k[..., :count, :, :], keys.v[..., :count, :, :], keys.mask_BPQS[..., :count])


def _block(q_BPQHE, sets, backend, chunk):
  """One block of queries, heads first."""
  B, P, Q, H, E = q_BPQHE.shape
  K = sets[-1].k.shape[-2]
  q_BKPQRE = (q_BPQHE * E**-0.5).reshape(B, P, Q, K, H // K, E).transpose(0, 3, 1, 2, 4, 5)

  def heads_first(a):
    return jnp.moveaxis(a[:, 0] if a.ndim == 5 and P == 1 else a, -2, 1)

  if any(keys.filled for keys in sets):
    backend = "chunked"
  sets = [k if k.filled else k._replace(k=heads_first(k.k), v=heads_first(k.v)) for k in sets]
  mixed_BKPQRE = BACKENDS[backend].function(q_BKPQRE, sets, chunk)
  return mixed_BKPQRE.transpose(0, 2, 3, 1, 4, 5).reshape(B, P, Q, H, E)


def _fold(a_BKPQRX, keys: Keys):
  """Queries (or what there is for each of them) as the rows of matrices, one for each set of keys."""
  B, K, P, Q, R, X = a_BKPQRX.shape
  return a_BKPQRX.reshape((B, K, P, Q * R, X) if keys.k.ndim == 5 else (B, K, P * Q * R, X))


def _scores(q_BKPQRE, keys: Keys):
  """score_BKPQRS in float32, MASKED where the query does not see the key."""
  score = product("...mx,...sx->...ms", _fold(q_BKPQRE, keys), keys.k)
  return jnp.where(keys.mask_BPQS[:, None, :, :, None], score.reshape(*q_BKPQRE.shape[:-1], -1), MASKED)


def _values(weight_BKPQRS, keys: Keys):
  """Values [B, K, P, Q, R, E] mixed by weights, in float32."""
  mixed = product("...mx,...xe->...me", _fold(weight_BKPQRS.astype(keys.v.dtype), keys), keys.v)
  return mixed.reshape(*weight_BKPQRS.shape[:-1], -1)


def _einsum(q_BKPQRE, sets, chunk):
  """All scores at once, differentiated as they stand: sets share one maximum and one denominator."""
  del chunk
  scores = [_scores(q_BKPQRE, keys) for keys in sets]
  largest = jnp.max(jnp.stack([jnp.max(score, axis=-1) for score in scores]), axis=0)
  # A softmax does not depend on what is subtracted, and so neither does its gradient.
  largest = jax.lax.stop_gradient(largest)
  weights = [jnp.exp(score - largest[..., None]) for score in scores]
  total = sum(jnp.sum(weight, axis=-1) for weight in weights)
  total = jnp.where(largest > MASKED, total, jnp.inf)
  mixed_BKPQRE = sum(map(_values, weights, sets)) / total[..., None]
  return mixed_BKPQRE.astype(q_BKPQRE.dtype)


class Part(NamedTuple):
  """How a backend does one set of keys, both ways.

  forward: (q, keys, option) -> (mixed_BKPQRE over this set alone, log-sum-exp [B, K, P, Q, R] of its scores), both
    float32; 0 and MASKED for a query that sees none of it.
  backward: (q, keys, log-sum-exp over all sets, delta, dmixed, option) -> (dq, dk, dv) of this set, with
    delta = sum_e mixed dmixed [B, K, P, Q, R] over all sets.
  option: static, for both.
  """

  forward: Callable
  backward: Callable
  option: int | bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def merged(parts: tuple[Part, ...], q_BKPQRE, sets):
  """Attention over the union of sets, each done by its part; differentiable in q and in the k and v of every set.

  With the weights w = exp(score - L), L the log-sum-exp over all sets, and delta as of Part (Dao et al. 2022,
  arXiv:2205.14135, for one set):  dv = w^T dmixed,  dscore = w (dmixed v^T - delta),  dq = dscore k,  dk = dscore^T q.
  L and delta belong to the query and not to a set, so that each set's backward pass can be done apart.
  """
  return _merged_forward(parts, q_BKPQRE, sets)[0]


def _merged_forward(parts, q_BKPQRE, sets):
  found = [part.forward(q_BKPQRE, keys, part.option) for part, keys in zip(parts, sets, strict=True)]
  top = functools.reduce(jnp.maximum, [lse for _, lse in found])
  shares = [jnp.exp(lse - top) for _, lse in found]
  total = sum(shares)
  mixed = sum(share[..., None] * one for share, (one, _) in zip(shares, found, strict=True)) / total[..., None]
  mixed = mixed.astype(q_BKPQRE.dtype)
  # Where nothing is seen all scores are MASKED, and exp(MASKED - 0) is the weight that they should have.
  lse = jnp.where(top > MASKED, top + jnp.log(total), 0.0)
  return mixed, (q_BKPQRE, sets, mixed, lse)


def _merged_backward(parts, saved, dmixed):
  q, sets, mixed, lse = saved
  delta = jnp.sum(mixed.astype(jnp.float32) * dmixed.astype(jnp.float32), axis=-1)
  of_q, of_sets = [], []
  for part, keys in zip(parts, sets, strict=True):
    dq, dk, dv = part.backward(q, keys, lse, delta, dmixed, part.option)
    of_q.append(dq)
    of_sets.append(Keys(dk.astype(keys.k.dtype), dv.astype(keys.v.dtype), None))
  return sum(of_q).astype(q.dtype), of_sets


merged.defvjp(_merged_forward, _merged_backward)


def _sweep(visit, carry, keys: Keys, size: int):
  """Scans visit(carry, chunk of keys) -> (carry, made) over a set; made: arrays whose last axis but one is keys."""
  if keys.filled:
    return _sweep_filled(visit, carry, keys), None
  S = keys.k.shape[-2]
  if size >= S:
    return visit(carry, keys)
  edge = ("batch", "kv_heads", *["streams"] * (keys.k.ndim - 4))
  k, v = constrain([keys.k, keys.v], *edge, None, None)  # a loop must not gather keys in each of its trips

  def chunk(start, width):
    cut = lambda a, axis: jax.lax.dynamic_slice_in_dim(a, start, width, axis=axis)
    return Keys(cut(k, k.ndim - 2), cut(v, v.ndim - 2), cut(keys.mask_BPQS, 3))

  whole, rest = divmod(S, size)
  carry, made = jax.lax.scan(lambda carry, i: visit(carry, chunk(i * size, size)), carry, jnp.arange(whole))
  made = jax.tree.map(lambda a: jnp.moveaxis(a, 0, -3).reshape(*a.shape[1:-2], whole * size, a.shape[-1]), made)
  if rest:
    carry, last = visit(carry, chunk(S - rest, rest))
    made = jax.tree.map(lambda *pair: jnp.concatenate(pair, axis=-2), made, last)
  return carry, made


def _sweep_filled(visit, carry, keys: Keys):
  """The carry after the blocks that are filled. Each is cut from the whole cache: a layer of that would be a copy."""
  (layer, count), size = keys.filled, keys.k.shape[-2]

  def block(i, carry):
    cut = lambda a: jax.lax.dynamic_slice(a, (layer, i, *[0] * (a.ndim - 2)), (1, 1, *a.shape[2:]))[0, 0]
    mask = jax.lax.dynamic_slice_in_dim(keys.mask_BPQS, i * size, size, axis=3)
    return visit(carry, Keys(cut(keys.k), cut(keys.v), mask))[0]

  return jax.lax.fori_loop(0, -(-count // size), block, carry)


def _chunked_forward(q_BKPQRE, keys: Keys, size: int):
  """Chunk after chunk with a running maximum and denominator (Milakov and Gimelshein 2018, arXiv:1805.02867)."""
  if not keys.filled:
    # Layers and think steps share the mask. When JAX differentiates loops over them it takes out what they share: the
    # mask of all chunks, once for each query and head. So the mask is made to look like a thing of these queries.
    q_BKPQRE, keys = jax.lax.optimization_barrier((q_BKPQRE, keys))

  def visit(carry, keys):
    top, total, mixed = carry
    score = _scores(q_BKPQRE, keys)
    new = jnp.maximum(top, jnp.max(score, axis=-1))
    fade, weight = jnp.exp(top - new), jnp.exp(score - new[..., None])
    return (new, fade * total + jnp.sum(weight, axis=-1), fade[..., None] * mixed + _values(weight, keys)), None

  zero = jnp.zeros(q_BKPQRE.shape, jnp.float32)
  (top, total, mixed), _ = _sweep(visit, (zero[..., 0] + MASKED, zero[..., 0], zero), keys, size)
  blind = top <= MASKED
  return mixed / jnp.where(blind, jnp.inf, total)[..., None], jnp.where(blind, MASKED, top + jnp.log(total))


def _chunked_backward(q_BKPQRE, keys: Keys, lse, delta, dmixed, size: int):
  """The weights again from the log-sum-exp, chunk after chunk."""
  if keys.filled:
    raise ValueError("keys of a cache with room left have no gradient: they are for decoding, which trains nothing")
  narrow = q_BKPQRE.dtype

  def visit(dq, keys):
    weight = jnp.exp(_scores(q_BKPQRE, keys) - lse[..., None])
    dweight = product("...me,...se->...ms", _fold(dmixed, keys), keys.v).reshape(weight.shape)
    dscore = (weight * (dweight - delta[..., None])).astype(narrow)
    to_keys = lambda a, b: product("...ms,...me->...se", _fold(a, keys), _fold(b, keys))
    dk, dv = to_keys(dscore, q_BKPQRE), to_keys(weight.astype(narrow), dmixed)
    dq += product("...mx,...xe->...me", _fold(dscore, keys), keys.k).reshape(dq.shape)
    return dq, (dk.astype(keys.k.dtype), dv.astype(keys.v.dtype))

  dq, (dk, dv) = _sweep(visit, jnp.zeros(q_BKPQRE.shape, jnp.float32), keys, size)
  return dq, dk, dv


def _by_chunks(size: int) -> Part:
  return Part(_chunked_forward, _chunked_backward, size)


def _chunked(q_BKPQRE, sets, chunk):
  """In portable JAX. Temporaries grow with queries x chunk."""
  return merged((_by_chunks(chunk),) * len(sets), q_BKPQRE, sets)


def _auto(q_BKPQRE, sets, chunk):
  """All scores at once where no set has more keys than a chunk, which is faster; else by chunks."""
  small = all(keys.k.shape[-2] <= chunk for keys in sets)
  return (_einsum if small else _chunked)(q_BKPQRE, sets, chunk)


def _splash(q_BKPQRE, sets, chunk, interpret: bool = False):
  """Sets that all streams share by the TPU kernels, if they are no smaller than a block; the others by chunks."""
  from thinking_lm.model import splash  # a third of a second to import, for those who use it

  kernel, other = Part(splash.forward, splash.backward, interpret), _by_chunks(chunk)
  least = 1 if interpret else splash.LANES
  fits = lambda keys: keys.k.ndim == 4 and min(math.prod(q_BKPQRE.shape[2:4]), keys.k.shape[2]) >= least
  return merged(tuple(kernel if fits(keys) else other for keys in sets), q_BKPQRE, sets)


def _cudnn(q_BKPQRE, sets, chunk, implementation: str = "cudnn"):
  """All keys in one call of cuDNN where all streams share them; else by chunks, since what the call knows of its
  log-sum-exp has no gradient. cuDNN wants even numbers of queries and keys.
  """
  if any(keys.k.ndim == 5 for keys in sets):
    return _chunked(q_BKPQRE, sets, chunk)
  B, K, P, Q, R, E = q_BKPQRE.shape
  q_BXHE = jnp.moveaxis(q_BKPQRE, 1, 3).reshape(B, P * Q, K * R, E)
  k_BSKE, v_BSKE = (jnp.concatenate(several, axis=2).swapaxes(1, 2) for several in list(zip(*sets, strict=True))[:2])
  mask_BPQS = [jnp.broadcast_to(keys.mask_BPQS, (B, P, Q, keys.mask_BPQS.shape[3])) for keys in sets]
  mask_BXS = jnp.concatenate(mask_BPQS, axis=3).reshape(B, P * Q, -1)
  even = lambda a, *axes: jnp.pad(a, [(0, a.shape[axis] % 2 if axis in axes else 0) for axis in range(a.ndim)])
  mask = even(mask_BXS, 1, 2)[:, None]
  given = (even(q_BXHE, 1), even(k_BSKE, 1), even(v_BSKE, 1))
  mixed = jax.nn.dot_product_attention(*given, mask=mask, scale=1.0, implementation=implementation)[:, : P * Q]
  mixed = jnp.where(jnp.any(mask_BXS, axis=-1)[..., None, None], mixed, 0)
  return jnp.moveaxis(mixed.reshape(B, P, Q, K, R, E), 3, 1)


class Backend(NamedTuple):
  """A way to compute attention.

  function: (q_BKPQRE scaled by E^-1/2, sets with heads first, keys of a chunk) -> mixed_BKPQRE in the type of q.
  platform: of JAX, the only one that it runs on; None: it runs anywhere.
  """

  function: Callable
  platform: str | None = None


BACKENDS = dict(
  auto=Backend(_auto),
  einsum=Backend(_einsum),
  chunked=Backend(_chunked),
  splash=Backend(_splash, "tpu"),
  splash_interpret=Backend(functools.partial(_splash, interpret=True)),
  cudnn=Backend(_cudnn, "gpu"),
)
"""splash_interpret: the kernels step by step on any device, a thousand times slower: for tests. cudnn was never run."""
