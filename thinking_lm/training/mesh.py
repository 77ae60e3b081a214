"""The device mesh, how it splits parameters (by the rules of `sharding.py`), and host rows to global arrays."""

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from thinking_lm import types
from thinking_lm.config import option
from thinking_lm.errors import ConfigError
from thinking_lm.sharding import spec


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many devices split each direction; the product is the number of devices of all hosts."""

  data: int = option(
    -1, "copies of the parameters, each with its own rows, over all slices; -1 = all remaining devices", low=-1
  )
  fsdp: int = option(1, "devices that share the rows and hold a part of every parameter each; -1 as above", low=-1)
  tensor: int = option(1, "devices that split heads, MLP and vocabulary; -1 as above", low=-1)
  sequence: int = option(
    1, "devices that split the tokens of a row (but where serial thoughts stay in it: refused); -1 as above", low=-1
  )

  def faults(self):
    """Lines about sizes that cannot go together."""
    sizes = dataclasses.asdict(self)
    if 0 in sizes.values():
      yield f"a mesh axis must have 1 or more devices, or -1 for all remaining ones, got {sizes}"
    if list(sizes.values()).count(-1) > 1:
      yield f"only one mesh axis can be -1 (all remaining devices), got {sizes}"


def join(option: str) -> None:
  """Joins the other processes of the job, which JAX finds; call it before anything asks for devices.

  Raises ConfigError if nothing says which they are; `option` is what asked for this.
  """
  try:
    jax.distributed.initialize()
  except ValueError as error:
    raise ConfigError(
      f"{option} is set, and JAX cannot tell here which the other processes are ({str(error).rstrip('.')}): start the "
      "command on every host of a TPU pod, or by Slurm's, Open MPI's or Kubernetes' launcher, or turn it off"
    ) from error


def everywhere() -> Mesh:
  """The mesh of evaluation and generation: rows and parameters are split over all devices that there are."""
  return make_mesh(MeshConfig(data=1, fsdp=-1))


def resolve(config: MeshConfig, devices: int) -> dict[str, int]:
  """Mesh axis -> size on so many devices. Raises ConfigError if the sizes do not multiply to that number."""
  sizes = dataclasses.asdict(config)
  known = math.prod(size for size in sizes.values() if size != -1)
  if -1 in sizes.values() and devices % known == 0:
    sizes = {name: devices // known if size == -1 else size for name, size in sizes.items()}
  if math.prod(sizes.values()) != devices:
    raise ConfigError(
      f"config.mesh {dataclasses.asdict(config)} does not fit the {devices} devices there are; the sizes must "
      f"multiply to {devices} (one of them may be -1)"
    )
  return sizes


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """The mesh of `devices` (default: all) that `config` asks for. The data axis goes over slices, all others within one.

  Raises:
    ConfigError: as of `resolve`, or a data axis that the slices do not divide.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = resolve(config, len(devices))
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if sizes["data"] % slices:
    raise ConfigError(
      f"config.mesh.data {sizes['data']} is not a multiple of the {slices} slices: only copies of the parameters are "
      "worth their traffic over the data-centre network"
    )
  shape = tuple(sizes.values())
  # A torus dimension may serve two mesh axes: a 16 x 16 slice has no other way to a tensor axis of 4.
  if slices == 1:
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  else:
    within, across = (sizes["data"] // slices, *shape[1:]), (slices, *(1,) * (len(shape) - 1))
    grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
  # Auto: the compiler propagates shardings; Explicit (the library's default) would need them on every operation.
  return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def device_faults(config: MeshConfig, batch_size: int, accumulation: int, devices: int) -> list[str]:
  """Lines about a mesh that the devices do not fill, and rows that mesh or micro-batches do not divide."""
  try:
    sizes = resolve(config, devices)
  except ConfigError as error:
    return error.faults
  ways = sizes["data"] * sizes["fsdp"]
  if batch_size % (ways * accumulation) == 0:
    return []
  return [
    f"config.train.batch_size {batch_size} is not a multiple of mesh.data * mesh.fsdp * train.accumulation = "
    f"{sizes['data']} * {sizes['fsdp']} * {accumulation} = {ways * accumulation}"
  ]


def shardings(axes: Any, shapes: types.Params, mesh: Mesh) -> Any:
  """A NamedSharding for every parameter.

  Args:
    axes: like the parameters, with a tuple of logical axis names (or None) for each array.
    shapes: the parameters, or their ShapeDtypeStructs.
    mesh: as of `make_mesh`.
  """

  def is_axes(node):
    return isinstance(node, tuple)

  if jax.tree.structure(axes, is_leaf=is_axes) != jax.tree.structure(shapes):
    raise ValueError("axes and parameters have different trees")
  return jax.tree.map(lambda a, x: NamedSharding(mesh, spec(a, x.shape, mesh)), axes, shapes, is_leaf=is_axes)


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
  """How an array of a batch is split: its rows, and the tokens of a row."""
  axes = ("batch", "length", *(None,) * (len(shape) - 2))[: len(shape)]
  return NamedSharding(mesh, spec(axes, shape, mesh))


def placed(shapes: Any, shardings: Any) -> Any:
  """Pytree of arrays or ShapeDtypeStructs, pytree of their shardings -> ShapeDtypeStructs that have these."""
  return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, shardings)


def abstract_batch(mesh: Mesh, rows: int, length: int) -> types.Batch:
  """The ShapeDtypeStructs of a global batch."""

  def leaf(kind, *shape):
    return jax.ShapeDtypeStruct(shape, kind, sharding=batch_sharding(mesh, shape))

  integers = [leaf(np.int32, rows, length) for _ in range(4)]
  return types.Batch(*integers[:2], leaf(np.float32, rows, length), *integers[2:], leaf(np.uint32, rows))


def held(mesh: Mesh, size: int) -> list[int]:
  """The rows of a batch of `size` of which devices of this process hold something, ascending.

  Processes share rows where a mesh axis that splits no rows, `tensor` or `sequence`, goes over several of them.
  """
  slices = batch_sharding(mesh, (size,)).addressable_devices_indices_map((size,)).values()
  return sorted({row for (rows,) in slices for row in range(*rows.indices(size))})


def global_batch(mesh: Mesh, rows: types.Batch, size: int | None = None) -> types.Batch:
  """The batch of device arrays that has `size` rows, of which `rows` are those that `held` names (None: has all)."""
  own = held(mesh, size) if size else range(len(rows.ids_B))
  size = size or len(own)

  def place(leaf: np.ndarray) -> jax.Array:
    leaf = np.asarray(leaf)
    shape = (size, *leaf.shape[1:])

    def part(index):
      start, stop, _ = index[0].indices(size)
      first = bisect.bisect_left(own, start)
      return leaf[first : first + stop - start, *index[1:]]

    return jax.make_array_from_callback(shape, batch_sharding(mesh, shape), part)

  return jax.tree.map(place, rows)


def feed(mesh: Mesh, size: int, read: Callable[..., Iterator[types.Batch]]) -> Iterator[types.Batch]:
  """Batches of `size` rows as device arrays. read(share=numbers of rows) -> this process' rows of each, on the host."""
  for rows in read(share=held(mesh, size)):
    yield global_batch(mesh, rows, size)
