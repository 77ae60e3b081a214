"""The device mesh, the one table from logical axis names to mesh axes, and host rows to global arrays."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from thinking_lm import types
from thinking_lm.config import option
from thinking_lm.errors import ConfigError

RULES = dict(
  batch=("data", "fsdp"),
  length="sequence",
  layers=None,
  embed="fsdp",
  mlp="tensor",
  heads="tensor",
  kv_heads="tensor",
  head_dim=None,
  vocab="tensor",
)
"""Logical axis name -> mesh axis or axes that split it; None keeps it whole. The model names axes, only this table
says what happens to them. A mesh axis splits one dimension of an array at most: the first that asks for it."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many devices split each direction; the product is the number of devices of all hosts."""

  data: int = option(-1, "copies of the parameters, each with its own rows; -1 = all remaining devices", low=-1)
  fsdp: int = option(1, "devices that share the rows and hold a part of every parameter each; -1 as above", low=-1)
  tensor: int = option(1, "devices that split heads, MLP and vocabulary; -1 as above", low=-1)
  sequence: int = option(1, "devices that split the tokens of a row; -1 as above", low=-1)

  def faults(self):
    """Lines about sizes that cannot go together."""
    sizes = dataclasses.asdict(self)
    if 0 in sizes.values():
      yield f"a mesh axis must have 1 or more devices, or -1 for all remaining ones, got {sizes}"
    if list(sizes.values()).count(-1) > 1:
      yield f"only one mesh axis can be -1 (all remaining devices), got {sizes}"


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
  """The mesh of `devices` (default: all) that `config` asks for. Raises ConfigError as of `resolve`."""
  devices = jax.devices() if devices is None else devices
  sizes = resolve(config, len(devices))
  # Auto: the compiler propagates shardings; Explicit (the library's default) would need them on every operation.
  types_ = (AxisType.Auto,) * len(sizes)
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types_, devices=devices)


def device_faults(config: MeshConfig, batch_size: int, accumulation: int, devices: int, processes: int) -> list[str]:
  """Lines about a mesh that the devices do not fill, and rows that mesh, hosts or micro-batches do not divide."""
  try:
    sizes = resolve(config, devices)
  except ConfigError as error:
    return error.faults
  ways = sizes["data"] * sizes["fsdp"]
  faults = []
  if batch_size % (ways * accumulation):
    faults.append(
      f"config.train.batch_size {batch_size} is not a multiple of mesh.data * mesh.fsdp * train.accumulation = "
      f"{sizes['data']} * {sizes['fsdp']} * {accumulation} = {ways * accumulation}"
    )
  if batch_size % processes:
    faults.append(f"config.train.batch_size {batch_size} is not a multiple of the {processes} processes")
  return faults


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  """How an array with these logical axes is split. A dimension that its mesh axes do not divide stays whole.

  Raises:
    ValueError: an axis that `RULES` does not know, or another number of axes than dimensions.
  """
  if len(axes) != len(shape):
    raise ValueError(f"axes {axes} do not name the {len(shape)} dimensions of shape {shape}")
  taken: set[str] = set()
  parts = []
  for name, size in zip(axes, shape, strict=True):
    if name is not None and name not in RULES:
      raise ValueError(f"unknown logical axis {name!r}; known: {', '.join(RULES)}")
    rule = RULES[name] if name is not None else None
    wanted = (rule,) if isinstance(rule, str) else (rule or ())
    fits = size % math.prod(mesh.shape[axis] for axis in wanted) == 0
    if not wanted or taken.intersection(wanted) or not fits:
      parts.append(None)
      continue
    taken.update(wanted)
    parts.append(rule)
  return PartitionSpec(*parts)


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


def global_batch(mesh: Mesh, host_batch: types.Batch) -> types.Batch:
  """The global batch of device arrays of which this process holds `host_batch`, its consecutive share of the rows."""

  def place(rows: np.ndarray) -> jax.Array:
    rows = np.asarray(rows)
    shape = (rows.shape[0] * jax.process_count(), *rows.shape[1:])
    axes = ("batch", "length", *(None,) * (rows.ndim - 2))[: rows.ndim]
    return jax.make_array_from_process_local_data(NamedSharding(mesh, spec(axes, shape, mesh)), rows, shape)

  return jax.tree.map(place, host_batch)
