"""Every backend of attention against one softmax over all keys, in float64; values and gradients."""

import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from thinking_lm.model import attention as backends
from thinking_lm.model.attention import BACKENDS, MASKED, Filled, Keys, attention
from thinking_lm.training.mesh import MeshConfig, make_mesh

B, E = 2, 6


class Case(NamedTuple):
  """Sets of keys: how many, whether each stream has its own, and a mask [B, P, Q, S]."""

  P: int
  Q: int
  H: int
  K: int
  sets: tuple[tuple[int, bool, np.ndarray], ...]


def case(P, Q, H, K, *sets) -> Case:
  return Case(P, Q, H, K, tuple(sets))


def some(*shape, seed=1):
  return np.random.default_rng(seed).random(shape) < 0.7


def packed():
  """Two documents and padding in each row, cut at other places."""
  segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 2, 2, 2]])
  same = segments[:, None, :, None] == segments[:, None, None, :]
  return same & (segments > 0)[:, None, None] & CAUSAL


CAUSAL = np.tril(np.ones((1, 1, 8, 8), bool))
OWN = CAUSAL[:, :, :4, :4]
PAST = some(B, 3, 1, 5)
FAR = np.arange(260) < np.array([[5, 60, 100], [5, 130, 260]])[:, :, None, None]
MANY = np.arange(260) < np.random.default_rng(3).integers(0, 260, (B, 130, 1, 1))
CASES = {
  "plain": case(1, 8, 2, 2, (8, True, CAUSAL)),
  "packed documents": case(1, 8, 2, 2, (8, True, packed())),
  "prefix and private streams": case(3, 4, 2, 2, (5, False, PAST), (4, True, OWN)),
  "grouped heads": case(3, 4, 4, 2, (5, False, PAST), (4, True, OWN)),
  "past and own cache": case(3, 4, 4, 2, (5, False, PAST), (7, True, some(B, 3, 4, 7)), (4, True, OWN)),
  "one stream with a cache": case(1, 4, 4, 2, (5, False, PAST[:, :1]), (4, True, OWN)),
  "some see nothing": case(3, 4, 4, 2, (5, False, PAST & False), (4, True, OWN & (np.arange(4)[:, None] > 1))),
  "several blocks": case(3, 50, 2, 1, (260, False, FAR), (3, True, some(B, 3, 50, 3))),
  "many streams": case(130, 3, 2, 1, (260, False, MANY), (3, True, some(B, 130, 3, 3))),
  "one query": case(3, 1, 4, 2, (7, True, some(B, 3, 1, 7)), (1, True, OWN[:, :, :1, :1])),
}


HERE = [name for name, backend in BACKENDS.items() if backend.platform is None]
"""Those that run on a CPU."""
KERNELS = ["packed documents", "past and own cache", "some see nothing", "several blocks", "many streams"]
"""Cases for kernels that run step by step, which compile for seconds: together they have all that is in the others."""
RUNS = [(backend, name) for backend in HERE for name in (KERNELS if backend == "splash_interpret" else CASES)]


def values_of(case: Case):
  random = np.random.default_rng(0)
  shapes = [(B, case.P, case.Q, case.H, E)]
  for S, own, _ in case.sets:
    shapes += [(B, case.P, S, case.K, E) if own else (B, S, case.K, E)] * 2
  return [random.normal(size=shape) for shape in shapes]


def keys_of(case: Case, values):
  pairs = zip(values[1::2], values[2::2], case.sets, strict=True)
  return [Keys(k, v, jnp.asarray(mask)) for k, v, (_, _, mask) in pairs]


def oracle(case: Case, values):
  """Every head and stream gets keys of its own, all sets become one, and one softmax is written out."""
  wide = lambda a: a if a.ndim == 5 else jnp.repeat(a[:, None], case.P, axis=1)
  join = lambda parts: jnp.repeat(jnp.concatenate([wide(a) for a in parts], axis=2), case.H // case.K, axis=3)
  k, v = join(values[1::2]), join(values[2::2])
  mask = np.concatenate([np.broadcast_to(m, (B, case.P, case.Q, m.shape[-1])) for _, _, m in case.sets], axis=-1)
  weight = jnp.exp(jnp.einsum("bpqhe,bpshe->bpqhs", values[0], k) / np.sqrt(E)) * mask[:, :, :, None]
  total = weight.sum(axis=-1, keepdims=True)
  return jnp.einsum("bpqhs,bpshe->bpqhe", weight / jnp.where(total > 0, total, 1), v)


@functools.cache
def wanted(name, dtype):
  """(the values as `dtype` holds them, the oracle's value and its gradients)."""
  case = CASES[name]
  with jax.enable_x64(True):
    values = [jnp.asarray(a, dtype).astype(jnp.float64) for a in values_of(case)]
    total = lambda *values: weighed(case, oracle(case, values))
    return values, *jax.jit(jax.grad(total, range(len(values)), has_aux=True))(*values)


def weighed(case: Case, mixed):
  """(a number to differentiate, the mixed values themselves)."""
  weights = np.random.default_rng(2).normal(size=(B, case.P, case.Q, case.H, E))
  return jnp.sum(mixed * weights), mixed


def errors(function, name, dtype=jnp.float32):
  """Relative error of the value, and of each gradient: q, then k and v of each set."""
  case, (wide, gradients, value) = CASES[name], wanted(name, dtype)
  values = [jnp.asarray(np.asarray(a), dtype) for a in wide]
  total = lambda *values: weighed(case, function(values[0], keys_of(case, values)))
  got, mixed = jax.jit(jax.grad(total, range(len(values)), has_aux=True))(*values)
  assert all(a.dtype == dtype for a in [*got, mixed])
  size = lambda a: float(np.linalg.norm(np.asarray(a, np.float64)))
  # What a key that nobody sees gets has no size of its own to be relative to.
  difference = lambda a, b: size(np.asarray(a, np.float64) - np.asarray(b)) / (size(b) or 1.0)
  return difference(mixed, value), [difference(a, b) for a, b in zip(got, gradients, strict=True)]


@pytest.mark.parametrize("backend,name", RUNS)
def test_values_and_gradients_equal_the_oracles(backend, name):
  value, gradient = errors(lambda q, sets: attention(q, sets, backend, chunk=3), name)
  assert value < 2e-6 and max(gradient) < 2e-6


@pytest.mark.parametrize("backend", HERE)
def test_in_bfloat16_they_are_as_near_as_it_can_be(backend):
  value, gradient = errors(lambda q, sets: attention(q, sets, backend, chunk=3), "past and own cache", jnp.bfloat16)
  assert value < 1e-2 and max(gradient) < 1e-2


def test_a_chunk_can_be_a_whole_set():
  value, gradient = errors(lambda q, sets: attention(q, sets, "chunked", chunk=5), "past and own cache")
  assert value < 2e-6 and max(gradient) < 2e-6


@pytest.mark.parametrize("backend", ["einsum", "chunked"])
def test_blocks_of_queries_change_nothing(backend):
  value, gradient = errors(lambda q, sets: attention(q, sets, backend, blocks=2, chunk=3), "packed documents")
  assert value < 2e-6 and max(gradient) < 2e-6


def naive(q, sets):
  """Two calls merged by a log-sum-exp without a gradient, as fused kernels return it. Exact forward."""
  parts, sums = [], []
  for group in (sets[:1], sets[1:]):
    parts.append(attention(q, group))
    repeats = q.shape[-2] // group[0].k.shape[-2]  # query heads of a key-value head
    scores = [
      jnp.where(
        one.mask_BPQS[:, :, None],
        jnp.einsum(
          "bpqhe,bpshe->bphqs" if one.k.ndim == 5 else "bpqhe,bshe->bphqs", q, jnp.repeat(one.k, repeats, axis=-2)
        )
        / np.sqrt(E),
        MASKED,
      )
      for one in group
    ]
    sums.append(jax.lax.stop_gradient(jax.nn.logsumexp(jnp.concatenate(scores, axis=-1), axis=-1)))
  first = jax.nn.sigmoid(sums[0] - sums[1]).swapaxes(2, 3)[..., None]
  return parts[0] * first + parts[1] * (1 - first)


@pytest.mark.parametrize("name", ["prefix and private streams", "past and own cache"])
def test_a_merge_by_log_sum_exp_is_right_forward_and_wrong_backward(name):
  value, gradient = errors(naive, name)
  assert value < 2e-6 and max(gradient[2::2]) < 2e-6  # values
  assert min(gradient[:2] + gradient[1::2]) > 0.05  # queries, keys


@pytest.mark.parametrize("backend", HERE)
def test_a_query_that_sees_nothing_gets_nothing(backend):
  case = CASES["past and own cache"]
  values = [jnp.asarray(a, jnp.float32) for a in values_of(case)]
  run = lambda *values: attention(
    values[0], [one._replace(mask_BPQS=one.mask_BPQS & False) for one in keys_of(case, values)], backend, chunk=3
  )
  total = jax.grad(lambda *values: (jnp.sum(mixed := run(*values)), mixed), range(len(values)), has_aux=True)
  gradients, mixed = jax.jit(total)(*values)
  assert not mixed.any() and not any(gradient.any() for gradient in gradients)


def test_chunks_do_not_keep_all_scores():
  """Temporaries of a gradient over four times the keys and queries: einsum's grow with their product."""
  memory = {}
  for backend in ("einsum", "chunked", "auto"):
    for S in (256, 1024):
      shape = jax.ShapeDtypeStruct((1, 1, S, 2, 16), jnp.float32)
      mask = jax.ShapeDtypeStruct((1, 1, S, S), bool)
      run = lambda q, k, v, mask, backend=backend: jnp.sum(attention(q, [Keys(k, v, mask)], backend, chunk=64))
      compiled = jax.jit(jax.grad(run, (0, 1, 2))).lower(*[shape] * 3, mask).compile()
      memory[backend, S] = compiled.memory_analysis().temp_size_in_bytes
  assert memory["einsum", 1024] > 8 * memory["einsum", 256]
  for backend in ("chunked", "auto"):
    assert memory[backend, 1024] < 5 * memory[backend, 256] < 5 * memory["einsum", 256]


def test_auto_takes_chunks_as_soon_as_one_set_is_larger(monkeypatch):
  taken = []
  for name in ("_einsum", "_chunked"):
    made = getattr(backends, name)
    monkeypatch.setattr(backends, name, lambda *given, name=name, made=made: taken.append(name) or made(*given))
  case = CASES["past and own cache"]  # of 5, 7 and 4 keys
  keys = keys_of(case, values := [jnp.asarray(a, jnp.float32) for a in values_of(case)])
  for chunk in (7, 6):
    attention(values[0], keys, chunk=chunk)
  assert taken == ["_einsum", "_chunked"]


@pytest.mark.parametrize(
  "name", ["packed documents", "past and own cache", "some see nothing", "one stream with a cache"]
)
def test_what_cudnn_is_given_is_right(monkeypatch, name):
  """By XLA in its place: cuDNN itself has never run."""
  by_xla = functools.partial(backends._cudnn, implementation="xla")
  monkeypatch.setitem(BACKENDS, "cudnn", backends.Backend(by_xla))
  value, gradient = errors(lambda q, sets: attention(q, sets, "cudnn", chunk=3), name)
  assert value < 2e-6 and max(gradient) < 2e-6


def room_left(keys: Keys, count: int, size: int = 2, layers: int = 3, layer: int = 1) -> Keys:
  """The keys as one layer of a cache in blocks, whose other layers and blocks that need no look are not numbers."""
  S = keys.k.shape[-3]
  C = -(-S // size)

  def blocks(a):
    a = np.moveaxis(np.asarray(a), -2, 1)
    a = np.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, C * size - S), (0, 0)])
    a = np.moveaxis(a.reshape(*a.shape[:-2], C, size, E), -3, 0)
    whole = np.full((layers, *a.shape), np.nan, a.dtype)
    whole[layer, : -(-count // size)] = a[: -(-count // size)]
    return jnp.asarray(whole)

  mask = np.pad(keys.mask_BPQS, [(0, 0)] * 3 + [(0, C * size - S)]) & (np.arange(C * size) < count)
  return Keys(blocks(keys.k), blocks(keys.v), jnp.asarray(mask), Filled(jnp.int32(layer), jnp.int32(count)))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (5, 7), (2, 5)])
@pytest.mark.parametrize("name", ["past and own cache", "one stream with a cache"])
def test_of_a_cache_with_room_left_no_more_is_read_than_is_filled(backend, counts, name):
  case = CASES[name]
  short = [
    (S, own, mask & (np.arange(S) < count)) for (S, own, mask), count in zip(case.sets, (*counts, 99), strict=False)
  ]
  case = case._replace(sets=(*short[: len(case.sets) - 1], case.sets[-1]))
  values = [np.asarray(a, np.float32) for a in values_of(case)]
  *seen, last = keys_of(case, values)
  given = [room_left(keys, count) for keys, count in zip(seen, counts, strict=False)]
  run = jax.jit(lambda q, sets: attention(q, sets, backend))
  got = run(jnp.asarray(values[0]), [*given, last])
  np.testing.assert_allclose(got, oracle(case, [a.astype(np.float64) for a in values]), rtol=1e-5, atol=1e-6)


def test_a_cache_with_room_left_has_no_gradient():
  case = CASES["past and own cache"]
  q, *_ = values = [np.asarray(a, np.float32) for a in values_of(case)]
  past, own, last = keys_of(case, values)
  run = lambda q: jnp.sum(attention(q, [past, room_left(own, 3), last]))
  with pytest.raises(ValueError, match="room left"):
    jax.grad(run)(jnp.asarray(q))


def test_kernels_are_split_over_devices():
  with jax.set_mesh(make_mesh(MeshConfig(data=2, sequence=2, tensor=2))):
    value, gradient = errors(lambda q, sets: attention(q, sets, "splash_interpret"), "one stream with a cache")
  assert value < 2e-6 and max(gradient) < 2e-6


def test_the_mask_of_kernels_does_not_grow_with_the_queries_of_a_stream():
  """The largest mask of a step, in bytes, by the number of a thought's tokens: streams x keys, and no more."""

  def masks(Q):
    q = jax.ShapeDtypeStruct((1, 128, Q, 2, 16), jnp.float32)
    k, mask = jax.ShapeDtypeStruct((1, 1024, 2, 16), jnp.float32), jax.ShapeDtypeStruct((1, 128, 1, 1024), bool)
    run = lambda q, k, v, mask: jnp.sum(attention(q, [Keys(k, v, mask)], "splash"))
    program = str(jax.make_jaxpr(jax.grad(run, (0, 1, 2)))(q, k, k, mask))
    return max(math.prod(map(int, shape.split(","))) for shape in re.findall(r"bool\[([\d,]+)\]", program))

  assert masks(1) == masks(16) == 128 * 1024


def test_the_kernels_take_large_shared_sets_and_leave_the_rest():
  """Counted in the program: one kernel forward, and one each for queries and for keys backward."""

  def kernels(S, streams):
    q, k = (jax.ShapeDtypeStruct((1, P, S, 2, 16), jnp.float32) for P in (1, streams))
    mask = jax.ShapeDtypeStruct((1, 1, S, S), bool)
    q = jax.ShapeDtypeStruct((1, streams, S, 2, 16), jnp.float32)
    run = lambda q, k, v, mask: jnp.sum(attention(q, [Keys(k, v, mask)], "splash"))
    return str(jax.make_jaxpr(jax.grad(run, (0, 1, 2)))(q, k, k, mask)).count("pallas_call[")

  assert (kernels(128, 1), kernels(127, 1), kernels(128, 2)) == (3, 0, 0)
