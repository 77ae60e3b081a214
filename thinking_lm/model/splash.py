"""The TPU kernels of splash attention as a part of attention: one set of keys that all streams share, both ways.

The kernels skip blocks of the mask that are empty. Theirs is a dense mask, one byte a query and key, of all heads
together, as it comes: of the kernels' own ways to say who sees whom none knows the prefix of a private thought. The
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
    mask_BXS, size = _rows(q, mask), q.shape[2] * q.shape[3]
    run = functools.partial(_forward_row, interpret=interpret)
    mixed, lse = jax.vmap(run)(_padded(_heads(q), 2), _padded(k, 2), _padded(v, 2), mask_BXS)
    seen = jnp.any(mask_BXS, axis=-1)[:, None]
    mixed = jnp.where(seen[..., None], mixed.astype(jnp.float32), 0.0)
    lse = jnp.where(seen, lse, MASKED)
    back = lambda a: _back(a[:, :, :size], q.shape)
    return back(mixed), back(lse[..., None])[..., 0]

  q, k, mask = _specs(q_BKPQRE, keys)
  return _everywhere(local, (q, k, k, mask), (q, PartitionSpec(*q[:5])))(q_BKPQRE, *keys)


def backward(q_BKPQRE, keys: Keys, lse, delta, dmixed, interpret: bool):
  """(dq, dk, dv) of one set, from the log-sum-exp and the delta over all of them."""
  q_spec, k_spec, mask_spec = _specs(q_BKPQRE, keys)
  split = [axis for names in q_spec[2:4] if names for axis in ([names] if isinstance(names, str) else names)]

  def local(q, k, v, mask, lse, delta, dmixed):
    S, size = k.shape[2], q.shape[2] * q.shape[3]
    wide = [_padded(_heads(a), 2) for a in (q, dmixed.astype(q.dtype))]
    narrow = [_padded(_heads(a[..., None]), 2)[..., 0] for a in (lse, delta)]
    run = functools.partial(_backward_row, interpret=interpret)
    dq, dk, dv = jax.vmap(run)(*wide, *narrow, _padded(k, 2), _padded(v, 2), _rows(q, mask))
    dk, dv = (a[:, :, :S].astype(jnp.float32) for a in (dk, dv))
    if split:  # each device has the keys' gradient by its own queries only
      dk, dv = jax.lax.psum((dk, dv), split)
    return _back(dq[:, :, :size], q.shape), dk, dv

  of_query = PartitionSpec(*q_spec[:5])
  specs = (q_spec, k_spec, k_spec, mask_spec, of_query, of_query, q_spec)
  return _everywhere(local, specs, (q_spec, k_spec, k_spec))(q_BKPQRE, *keys, lse, delta, dmixed)


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


def _heads(a_BKPQRX):
  """[B, H, P Q, X]."""
  B, K, P, Q, R, X = a_BKPQRX.shape
  return jnp.moveaxis(a_BKPQRX, 4, 2).reshape(B, K * R, P * Q, X)


def _back(a_BHXE, shape):
  """The opposite, for queries of this shape."""
  B, K, P, Q, R, _ = shape
  return jnp.moveaxis(a_BHXE.reshape(B, K, R, P, Q, -1), 2, 4)


def _padded(a, axis: int):
  widths = [(0, 0)] * a.ndim
  widths[axis] = (0, -a.shape[axis] % LANES)
  return jnp.pad(a, widths)


def _rows(q_BKPQRE, mask_BPQS):
  """mask_BXS of all queries, padded; what pads sees nothing and is not seen."""
  B, _, P, Q, *_ = q_BKPQRE.shape
  mask = jnp.broadcast_to(mask_BPQS, (B, P, Q, mask_BPQS.shape[3])).reshape(B, P * Q, -1)
  return _padded(_padded(mask, 1), 2)


def _blocks(*sizes: int):
  return tuple(next(block for block in BLOCKS if size % block == 0) for size in sizes)


def _info(process, mask_XS):
  info = process(mask_XS[None], _blocks(*mask_XS.shape))[0]
  return info._replace(partial_mask_blocks=info.partial_mask_blocks.reshape(-1, *info.partial_mask_blocks.shape[-2:]))


COMMON = dict(is_mqa=False, mask_value=kernels.DEFAULT_MASK_VALUE, attn_logits_soft_cap=None, mask_function=None)
LAYOUT = kernels.QKVLayout.HEAD_DIM_MINOR


def _forward_row(q_HXE, k_KSE, v_KSE, mask_XS, interpret):
  rows, columns = _blocks(*mask_XS.shape)
  mixed, (lse,) = kernels._splash_attention_forward(
    _info(masks.process_dynamic_mask, mask_XS),
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


def _backward_row(q_HXE, dmixed_HXE, lse_HX, delta_HX, k_KSE, v_KSE, mask_XS, interpret):
  rows, columns = _blocks(*mask_XS.shape)
  given = (q_HXE, k_KSE, v_KSE, None, None, lse_HX, dmixed_HXE, delta_HX)
  common = COMMON | dict(bq=rows, bkv=columns, q_layout=LAYOUT, k_layout=LAYOUT, v_layout=LAYOUT, interpret=interpret)
  dq = kernels._splash_attention_bwd_dq(*given, mask_info=_info(masks.process_dynamic_mask, mask_XS), **common)
  _, dk, dv = kernels._splash_attention_bwd_dkv(
    *given,
    mask_info=_info(masks.process_dynamic_mask_dkv, mask_XS),
    bkv_compute=columns,
    use_fused_bwd_kernel=False,
    **common,
  )
  return dq, dk, dv
