"""Attention over several sets of keys against one softmax over all of them, in float64; values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from thinking_lm.model.layers import MASKED, Keys, attention

B, P, Q, H, K, E, S = 2, 3, 4, 4, 2, 6, 5
NAMES = ("q", "past_k", "past_v", "own_k", "own_v", "k", "v")


def arrays(streams=P):
  """Queries, keys that all streams share, keys of each stream, and the queries' own."""
  random = np.random.default_rng(0)
  shapes = [(B, streams, Q, H, E)] + [(B, S, K, E)] * 2 + [(B, streams, 3, K, E)] * 2 + [(B, streams, Q, K, E)] * 2
  return [random.normal(size=shape) for shape in shapes]


def masks(streams=P):
  random = np.random.default_rng(1)
  return (
    random.random((B, streams, 1, S)) < 0.7,
    random.random((B, streams, Q, 3)) < 0.7,
    np.tril(np.ones((1, 1, Q, Q), bool)),
  )


def sets(values, streams=P):
  pairs = zip(values[1::2], values[2::2], masks(streams), strict=True)
  return [Keys(k, v, jnp.asarray(mask)) for k, v, mask in pairs]


def oracle(values, streams=P):
  """Every head and stream gets keys of its own, all sets become one, and one softmax is written out."""
  wide = lambda a: a if a.ndim == 5 else jnp.repeat(a[:, None], streams, axis=1)
  join = lambda parts: jnp.repeat(jnp.concatenate([wide(a) for a in parts], axis=2), H // K, axis=3)
  k, v = join(values[1::2]), join(values[2::2])
  mask = np.concatenate([np.broadcast_to(m, (B, streams, Q, m.shape[-1])) for m in masks(streams)], axis=-1)
  weight = jnp.exp(jnp.einsum("bpqhe,bpshe->bpqhs", values[0], k) / np.sqrt(E)) * mask[:, :, :, None]
  return jnp.einsum("bpqhs,bpshe->bpqhe", weight / weight.sum(axis=-1, keepdims=True), v)


def naive(q, sets):
  """Two calls merged by a log-sum-exp without a gradient, as fused kernels return it. Exact forward."""
  parts, sums = [], []
  for group in (sets[:2], sets[2:]):
    parts.append(attention(q, group))
    spread = jnp.repeat  # key-value heads to query heads
    scores = [
      jnp.where(
        one.mask_BPQS[:, :, None],
        jnp.einsum("bpqhe,bpshe->bphqs" if one.k.ndim == 5 else "bpqhe,bshe->bphqs", q, spread(one.k, H // K, axis=-2))
        / np.sqrt(E),
        MASKED,
      )
      for one in group
    ]
    sums.append(jax.lax.stop_gradient(jax.nn.logsumexp(jnp.concatenate(scores, axis=-1), axis=-1)))
  first = jax.nn.sigmoid(sums[0] - sums[1]).swapaxes(2, 3)[..., None]
  return parts[0] * first + parts[1] * (1 - first)


def errors(function, streams=P):
  """Relative error of the value, and of the gradient by name."""
  with jax.enable_x64(True):
    values = [jnp.asarray(a) for a in arrays(streams)]
    weights = np.random.default_rng(2).normal(size=values[0].shape)
    number = lambda of: lambda *values: jnp.sum(of(values) * weights)
    wanted = jax.grad(number(lambda v: oracle(v, streams)), range(7))(*values)
    value = oracle(values, streams)
  narrow = [jnp.asarray(a, jnp.float32) for a in arrays(streams)]
  got = jax.grad(number(lambda v: function(v[0], sets(v, streams))), range(7))(*narrow)
  size = lambda a: float(np.linalg.norm(np.asarray(a, np.float64)))
  difference = lambda a, b: size(np.asarray(a, np.float64) - np.asarray(b)) / size(b)
  found = {name: difference(a, b) for name, a, b in zip(NAMES, got, wanted, strict=True)}
  return difference(function(narrow[0], sets(narrow, streams)), value), found


@pytest.mark.parametrize("streams,blocks", [(P, 1), (1, 1), (1, 2)])
def test_values_and_gradients_equal_the_oracles(streams, blocks):
  value, gradient = errors(lambda q, sets: attention(q, sets, blocks), streams)
  assert value < 1e-6 and max(gradient.values()) < 1e-6


def test_a_merge_by_log_sum_exp_is_right_forward_and_wrong_backward():
  value, gradient = errors(naive)
  assert value < 1e-6
  assert max(gradient[name] for name in ("past_v", "own_v", "v")) < 1e-6
  assert min(gradient[name] for name in ("q", "past_k", "own_k", "k")) > 0.05


def test_a_query_that_sees_nothing_is_defined():
  values = [jnp.asarray(a, jnp.float32) for a in arrays()]
  blind = [one._replace(mask_BPQS=jnp.zeros_like(one.mask_BPQS)) for one in sets(values)]
  total = lambda q: jnp.sum(attention(q, blind))
  assert np.isfinite(total(values[0])) and np.isfinite(jax.grad(total)(values[0])).all()
