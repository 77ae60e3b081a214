"""The one table from logical axis names to mesh axes, and what it says of an array.

The model names the axes of its parameters and of its activations; only `RULES` says what happens to them. Outside
`jax.set_mesh` nothing is constrained, so that the same code runs on one device.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

RULES = dict(
  batch=("data", "fsdp"),
  copies="data",
  streams="sequence",
  length="sequence",
  layers=None,
  embed="fsdp",
  mlp="tensor",
  heads="tensor",
  kv_heads="tensor",
  vocab="tensor",
)
"""Logical axis name -> mesh axis or axes that split it; None keeps it whole. A mesh axis splits one dimension of an
array at most: the first that asks for it and that it divides.

batch: rows. copies: rows that the devices of one copy of the parameters share. streams, length: P and Q of a call of
the decoder, T of a batch. The others are of parameters."""

STAGED = 64
"""From how many devices on those that trade places do so in two stages."""


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
  """How an array with these logical axes is split. A dimension that its mesh axes do not divide stays whole.

  Raises:
    ValueError: an axis that `RULES` does not know, or another number of axes than dimensions.
  """
  if len(axes) != len(shape):
    raise ValueError(f"axes {axes} do not name the {len(shape)} dimensions of shape {shape}")
  taken: set[str] = set()
  parts: list[str | tuple[str, ...] | None] = []
  for name, size in zip(axes, shape, strict=True):
    if name is not None and name not in RULES:
      raise ValueError(f"unknown logical axis {name!r}; known: {', '.join(RULES)}")
    wanted = () if name is None else _wanted(name, mesh)
    fits = size % math.prod(mesh.shape[axis] for axis in wanted) == 0
    if not wanted or taken.intersection(wanted) or not fits:
      parts.append(None)
      continue
    taken.update(wanted)
    parts.append(wanted if len(wanted) > 1 else wanted[0])
  return PartitionSpec(*parts)


def _wanted(name: str, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
  """Mesh axes that split a logical axis: inside `each_copy`, where a row is of one copy, `data` is none of them."""
  rule = RULES[name] or ()
  return tuple(axis for axis in ((rule,) if isinstance(rule, str) else rule) if axis not in mesh.manual_axes)


@contextlib.contextmanager
def on_mesh_of(arrays: Any) -> Iterator[None]:
  """Sets the mesh that arrays are split over, for what is traced inside; without one nothing changes."""
  found = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(arrays))
  mesh = next((sharding.mesh for sharding in found if isinstance(sharding, NamedSharding)), None)
  with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
    yield


def fetch(arrays: Any) -> Any:
  """What a function of the devices of all processes gave, as NumPy arrays: whole, in every process."""
  if jax.process_count() == 1:
    return jax.device_get(arrays)
  return multihost_utils.process_allgather(arrays, tiled=True)


def ways(axis: str) -> int:
  """How many devices of the present mesh split a logical axis; 1 outside `jax.set_mesh`."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape[name] for name in _wanted(axis, mesh))


def each_copy(function: Callable[..., Any]) -> Callable[..., Any]:
  """The function of (rows, common): each copy of the parameters applies it to rows of its own, and the results add up.

  The results must be sums over rows. Nothing but these crosses the mesh axis `data`, and once: left to itself the
  compiler adds up what each use of a parameter contributes, in every trip of a loop. It is left to itself where more
  than one other axis is split: its partitioner (of jax 0.10 and 0.12, and of libtpu 0.0.42) ends the process on a
  lookup if the copies and two axes make three nested groups of devices. So it does where `sequence` is split in more
  than two, which it may split again: by streams and by their slots.
  """
  mesh = jax.sharding.get_abstract_mesh()
  sizes = {} if mesh.empty else mesh.shape
  others = [size for name, size in sizes.items() if name != "data" and size > 1]
  if sizes.get("data", 1) == 1 or len(others) > 1 or sizes.get("sequence", 1) > 2:
    return function

  def own(rows, common):
    return jax.lax.psum(function(rows, common), "data")

  specs = (PartitionSpec("data"), PartitionSpec())
  return jax.shard_map(own, in_specs=specs, out_specs=PartitionSpec(), axis_names={"data"}, check_vma=False)


def rows_of_columns(values: Any, *axes: str | None) -> Any:
  """An array [rows, *axes, columns] of which a device holds columns of all rows of its copy, so that it holds rows.

  Every device sends to every other one. For 256 of them on a torus libtpu's compiler looks for routes for 24 to 39
  CPU seconds, so from `STAGED` devices on it is done in groups of about N^1/2 that are next to each other, and then
  across these. On a torus whose rings these are, each link carries as much.
  """
  before, after = ("copies", *axes, "embed"), ("batch", *axes, None)
  values = constrain(values, *before)
  mesh, size = jax.sharding.get_abstract_mesh(), ways("embed")
  near = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
  divided = values.shape[0] % ways("batch") == 0 and values.shape[-1] % size == 0
  if size < STAGED or near == 1 or not divided:
    return constrain(values, *after)
  far = size // near
  within = [[ring * near + place for place in range(near)] for ring in range(far)]
  across = [[ring * near + place for ring in range(far)] for place in range(near)]

  def trade(own):
    rows, *middle, columns = own.shape
    own = own.reshape(far, near, rows // size, *middle, columns)  # whose rows these are
    own = jax.lax.all_to_all(own, axis, 1, 1, axis_index_groups=within)
    own = jax.lax.all_to_all(own, axis, 0, 0, axis_index_groups=across)
    own = jnp.moveaxis(own.reshape(size, rows // size, *middle, columns), 0, -2)
    return own.reshape(rows // size, *middle, size * columns)

  batch, (axis,) = _wanted("batch", mesh), _wanted("embed", mesh)
  columns = PartitionSpec(_wanted("copies", mesh), *(None for _ in axes), axis)
  specs = dict(in_specs=columns, out_specs=PartitionSpec(batch))
  return jax.shard_map(trade, **specs, axis_names=set(batch), check_vma=False)(values)


def constrain(values: Any, *axes: str | None) -> Any:
  """Arrays of one rank, each split as `spec` says on the present mesh; as they are where there is none.

  The compiler guesses well between constraints, but must be told at loops and reshapes: there it otherwise gathers
  activations instead of weights.
  """
  return constrain_each(values, jax.tree.map(lambda _: axes, values))


def constrain_each(values: Any, axes: Any) -> Any:
  """The same for arrays of any rank; `axes` is a tree like `values`, with a tuple for each array."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return values
  return jax.tree.map(lambda x, names: jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh)), values, axes)


def gathered(values: Any, axes: Any) -> Any:
  """Parameters as a serial loop reads them: what `fsdp` splits is put together once, not in every trip."""
  split = constrain_each(values, axes)  # so that a cast before this one is not left until after the exchange
  whole = lambda _, names: tuple(None if name is not None and RULES[name] == "fsdp" else name for name in names)
  return constrain_each(split, jax.tree.map(whole, values, axes))
