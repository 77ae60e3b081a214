import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from thinking_lm import sharding
from thinking_lm.errors import ConfigError
from thinking_lm.model import readout
from thinking_lm.training.mesh import MeshConfig, make_mesh


def test_what_does_not_divide_leaves_its_devices_to_the_next_axis():
  mesh = make_mesh(MeshConfig(data=2, sequence=4))
  axes = ("batch", "streams", "length", None)
  assert sharding.spec(axes, (2, 1, 8, 3), mesh) == P(("data", "fsdp"), None, "sequence", None)
  assert sharding.spec(axes, (2, 8, 8, 3), mesh) == P(("data", "fsdp"), "sequence", None, None)


def test_nothing_is_constrained_without_a_mesh():
  x = jnp.zeros((2, 4))
  assert sharding.ways("batch") == 1 and sharding.constrain(x, "batch", "length") is x


def test_a_constraint_holds_on_the_mesh():
  mesh = make_mesh(MeshConfig(data=2, sequence=4))
  with jax.set_mesh(mesh):
    split = jax.jit(lambda x: sharding.constrain(x + 1, "batch", "length"))(jnp.zeros((4, 8)))
    ways = jax.jit(lambda x: x * sharding.ways("batch"))(1)
  assert split.sharding.shard_shape((4, 8)) == (2, 2) and ways == 2


@pytest.mark.parametrize("others", [dict(), dict(fsdp=2), dict(sequence=2), dict(sequence=4), dict(fsdp=2, tensor=2)])
def test_sums_over_the_rows_of_each_copy_are_those_over_all_rows(others):
  rows, scale = np.arange(32.0, dtype=np.float32).reshape(8, 4), np.float32(3)
  seen = []

  def function(rows, scale):
    seen.append(rows.shape)
    return dict(total=scale * sharding.constrain(rows, "batch", None).sum(axis=0), ways=sharding.ways("batch"))

  mesh = make_mesh(MeshConfig(data=-1, **others))
  with jax.set_mesh(mesh):
    found = jax.jit(sharding.each_copy(function))(rows, scale)
  whole = len(others) > 1 or others.get("sequence") == 4  # XLA's partitioner cannot do that
  copies = mesh.shape["data"]
  assert seen[-1] == ((8, 4) if whole else (8 // copies, 4))
  np.testing.assert_array_equal(found["total"], 3 * rows.sum(axis=0))
  assert found["ways"] == copies * others.get("fsdp", 1), "one for each copy, which sees only its own split"


@pytest.mark.parametrize("rows,staged", [(8, 2), (8, 64), (6, 2)])
@pytest.mark.parametrize("shape", [dict(fsdp=8), dict(data=2, fsdp=4), dict(fsdp=4, tensor=2), dict(data=2, fsdp=2)])
def test_rows_are_put_together_from_columns_and_their_gradient_is_taken_apart(monkeypatch, shape, rows, staged):
  monkeypatch.setattr(sharding, "STAGED", staged)
  x, scale = (np.random.default_rng(i).normal(size=(rows, 2, 3, 8)).astype(np.float32) for i in range(2))
  mesh = make_mesh(MeshConfig(**shape), jax.devices()[: math.prod(shape.values())])

  def loss(x):
    whole = sharding.rows_of_columns(x * 2, "length", None)
    return jnp.sum(whole * scale), whole

  with jax.set_mesh(mesh):
    compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(x).compile()
  gradient, whole = compiled(x)
  np.testing.assert_array_equal(whole, 2 * x)
  np.testing.assert_array_equal(gradient, 2 * scale)
  stages = 0 if rows == 6 else 2 if staged < shape["fsdp"] else 1
  assert compiled.as_text().count(" all-to-all(") == 2 * stages


class Head:
  """Logits are the hidden states."""

  heads, embedding = (), np.zeros((7, 7))
  logits = staticmethod(lambda hidden: hidden)


@pytest.mark.parametrize("shape", [dict(), dict(data=2, sequence=4), dict(data=4, tensor=2)])
def test_chunks_of_the_readout_are_the_whole_and_keep_rows_in_their_place(monkeypatch, shape):
  monkeypatch.setattr(readout, "CHUNK", 6 * 7)
  rng = np.random.default_rng(0)
  hidden, targets = rng.normal(size=(4, 3, 5, 7)).astype(np.float32), rng.integers(0, 7, (4, 3, 5))
  with jax.set_mesh(make_mesh(MeshConfig(**shape))):
    logp, hit, top = jax.jit(lambda h, y: readout.target_logp(Head, h, y))(hidden, targets)
  double = hidden.astype(np.float64)
  expected = np.take_along_axis(double - np.log(np.exp(double).sum(-1, keepdims=True)), targets[..., None], -1)[..., 0]
  np.testing.assert_allclose(logp, expected, rtol=1e-5)
  np.testing.assert_array_equal(hit, double.argmax(-1) == targets)
  np.testing.assert_allclose(top, double.max(-1) - np.log(np.exp(double).sum(-1)), rtol=1e-5)


class Chip:
  """A device as a mesh sees it."""

  platform, process_index, device_kind = "pretended", 0, "pretended"

  def __init__(self, number, slice_index):
    self.id, self.slice_index = number, slice_index


def test_slices_are_crossed_by_copies_of_the_parameters_only():
  chips = [Chip(number, number // 4) for number in range(8)]
  with pytest.raises(ConfigError, match="data 1 is not a multiple of the 2 slices"):
    make_mesh(MeshConfig(data=1, fsdp=8), chips)
  mesh = make_mesh(MeshConfig(data=4, tensor=2), chips)
  assert [{chip.slice_index for chip in row.flat} for row in mesh.devices] == [{0}, {0}, {1}, {1}]
