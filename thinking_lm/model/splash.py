"""The TPU kernels of splash attention as a part of attention: one set of keys that all streams share, both ways.

The kernels skip blocks of the mask that are empty. Theirs is a dense mask of bytes, of all heads together, as it comes:
of the kernels' own ways to say who sees whom none knows the prefix of a private thought. Where all queries of a stream
see the same keys, as the n tokens of such a thought do, queries are ordered by their number first and by stream second,
so that each block of the mask, of streams and keys, is met n times: T x T bytes for T thoughts, and not T x T n. The
kernels' public function keeps its log-sum-exp from gradients and sets apart; here they are called one by one, with the
log-sum-exp and the delta of the whole operation (`attention.merged`). Written for jax 0.10.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as masks
from jax.sharding import PartitionSpec

from thinking_lm import sharding
from thinking_lm.model.attention import MASKED, Keys

LANES = 128
"""Queries and keys are padded to a multiple of this."""

BLOCKS = (512, 256, 128)
"""Queries or keys of a block, the first that divides them all."""

QUERIES = ("batch", "kv_heads", "streams", "length", None, None)
"""Logical axes of q_BKPQRE."""

KEYS = ("batch", "kv_heads", None, None)
"""Logical axes of keys [B, K, S, E]."""


def forward(q_BKPQRE, keys: Keys, interpret: bool):
  """(mixed_BKPQRE, log-sum-exp [B, K, P, Q, R]) of one set, as of `attention.Part`."""

  def local(q, k, v, mask):
    times = _times(q, mask)
    mask_BXS = _rows(q, mask, times)
    run = functools.partial(_forward_row, interpret=interpret, times=times)
    mixed, lse = jax.vmap(run)(_heads(q, times), _padded(k, 2), _padded(v, 2), mask_BXS)
    seen = jnp.tile(jnp.any(mask_BXS, axis=-1), (1, times))[:, None]
    mixed = jnp.where(seen[..., None], mixed.astype(jnp.float32), 0.0)
    lse = jnp.where(seen, lse, MASKED)
    return _back(mixed, q.shape, times), _back(lse[..., None], q.shape, times)[..., 0]

  q, k, mask = _specs(q_BKPQRE, keys)
  return _everywhere(local, (q, k, k, mask), (q, PartitionSpec(*q[:5])))(q_BKPQRE, *keys[:3])


def backward(q_BKPQRE, keys: Keys, lse, delta, dmixed, interpret: bool):
  """(dq, dk, dv) of one set, from the log-sum-exp and the delta over all of them."""
  q_spec, k_spec, mask_spec = _specs(q_BKPQRE, keys)
  split = [axis for names in q_spec[2:4] if names for axis in ([names] if isinstance(names, str) else names)]

  def local(q, k, v, mask, lse, delta, dmixed):
    S, times = k.shape[2], _times(q, mask)
    wide = [_heads(a, times) for a in (q, dmixed.astype(q.dtype))]
    narrow = [_heads(a[..., None], times)[..., 0] for a in (lse, delta)]
    run = functools.partial(_backward_row, interpret=interpret, times=times)
    dq, dk, dv = jax.vmap(run)(*wide, *narrow, _padded(k, 2), _padded(v, 2), _rows(q, mask, times))
    dk, dv = (a[:, :, :S].astype(jnp.float32) for a in (dk, dv))
    if split:  # each device has the keys' gradient by its own queries only
      dk, dv = jax.lax.psum((dk, dv), split)
    return _back(dq, q.shape, times), dk, dv

  of_query = PartitionSpec(*q_spec[:5])
  specs = (q_spec, k_spec, k_spec, mask_spec, of_query, of_query, q_spec)
  return _everywhere(local, specs, (q_spec, k_spec, k_spec))(q_BKPQRE, *keys[:3], lse, delta, dmixed)


def _specs(q_BKPQRE, keys):
  """How queries, keys and the mask are split on the present mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return (PartitionSpec(*[None] * 6), PartitionSpec(), PartitionSpec())
  q = sharding.spec(QUERIES, q_BKPQRE.shape, mesh)
  mask = zip((q[0], *q[2:4]), keys.mask_BPQS.shape, strict=False)
  return q, sharding.spec(KEYS, keys.k.shape, mesh), PartitionSpec(*(None if n == 1 else names for names, n in mask))


def _everywhere(function, given, made):
  """The function on every device's own part: the compiler cannot split a kernel."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return function
  rest = set(mesh.axis_names) - set(mesh.manual_axes)  # inside `sharding.each_copy` a copy is on its own already
  return jax.shard_map(function, in_specs=given, out_specs=made, axis_names=rest, check_vma=False)


def _times(q_BKPQRE, mask_BPQS) -> int:
  """How often a row of the mask is met: by all queries of its stream, or (few streams would be mostly padding) once."""
  P, Q = q_BKPQRE.shape[2:4]
  return Q if mask_BPQS.shape[2] == 1 and P >= LANES else 1


def _heads(a_BKPQRX, times: int):
  """[B, H, times X', X]: queries as rows, X' of them, padded, for each row of the mask."""
  B, K, P, Q, R, X = a_BKPQRX.shape
  rows = a_BKPQRX.transpose((0, 1, 4, 2, 3, 5) if times == 1 else (0, 1, 4, 3, 2, 5))
  return _padded(rows.reshape(B, K * R, times, P * Q // times, X), 3).reshape(B, K * R, -1, X)


def _back(a_BHXE, shape, times: int):
  """The opposite, for queries of this shape."""
  B, K, P, Q, R, _ = shape
  rows = a_BHXE.reshape(B, K * R, times, -1, a_BHXE.shape[-1])[:, :, :, : P * Q // times]
  if times == 1:
    return rows.reshape(B, K, R, P, Q, -1).transpose(0, 1, 3, 4, 2, 5)
  return rows.reshape(B, K, R, Q, P, -1).transpose(0, 1, 4, 3, 2, 5)


def _padded(a, axis: int):
  widths = [(0, 0)] * a.ndim
  widths[axis] = (0, -a.shape[axis] % LANES)
  return jnp.pad(a, widths)


def _rows(q_BKPQRE, mask_BPQS, times: int):
  """mask_BXS of all queries that are told apart, padded; what pads sees nothing and is not seen."""
  B, _, P, Q, *_ = q_BKPQRE.shape
  mask = jnp.broadcast_to(mask_BPQS, (B, P, Q // times, mask_BPQS.shape[3])).reshape(B, P * Q // times, -1)
  return _padded(_padded(mask, 1), 2)


def _blocks(*sizes: int):
  return tuple(next(block for block in BLOCKS if size % block == 0) for size in sizes)


def _info(mask_XS, times: int, to_keys: bool):
  """What the kernels want to know of a mask whose rows are met so often; to_keys: for the gradient of keys."""
  process = masks.process_dynamic_mask_dkv if to_keys else masks.process_dynamic_mask
  info = process(mask_XS[None], _blocks(*mask_XS.shape), downcast_smem_data=False)[0]
  tiled = lambda a: jnp.tile(a, (1, times, 1))
  block_mask, data_next, mask_next = map(tiled, (info.block_mask, info.data_next, info.mask_next))
  if to_keys:  # which block of queries
    data_next = jnp.where(block_mask > 0, jnp.arange(block_mask.shape[1], dtype=jnp.int32)[:, None], 0)
  blocks = info.partial_mask_blocks.reshape(-1, *info.partial_mask_blocks.shape[-2:])
  return info._replace(block_mask=block_mask, data_next=data_next, mask_next=mask_next, partial_mask_blocks=blocks)


COMMON = dict(is_mqa=False, mask_value=kernels.DEFAULT_MASK_VALUE, attn_logits_soft_cap=None, mask_function=None)
LAYOUT = kernels.QKVLayout.HEAD_DIM_MINOR


def _forward_row(q_HXE, k_KSE, v_KSE, mask_XS, interpret, times):
  rows, columns = _blocks(*mask_XS.shape)
  mixed, (lse,) = kernels._splash_attention_forward(
    _info(mask_XS, times, to_keys=False),
    q_HXE,
    k_KSE,
    v_KSE,
    None,
    None,
    block_sizes=kernels.BlockSizes(rows, columns),
    residual_checkpoint_name=None,
    save_residuals=True,
    interpret=interpret,
    **COMMON,
  )
  return mixed, lse


def _backward_row(q_HXE, dmixed_HXE, lse_HX, delta_HX, k_KSE, v_KSE, mask_XS, interpret, times):
  rows, columns = _blocks(*mask_XS.shape)
  given = (q_HXE, k_KSE, v_KSE, None, None, lse_HX, dmixed_HXE, delta_HX)
  common = COMMON | dict(bq=rows, bkv=columns, q_layout=LAYOUT, k_layout=LAYOUT, v_layout=LAYOUT, interpret=interpret)
  dq = kernels._splash_attention_bwd_dq(*given, mask_info=_info(mask_XS, times, to_keys=False), **common)
  _, dk, dv = kernels._splash_attention_bwd_dkv(
    *given,
    mask_info=_info(mask_XS, times, to_keys=True),
    bkv_compute=columns,
    use_fused_bwd_kernel=False,
    **common,
  )
  return dq, dk, dv
