"""What one chip can do, by public figures, and the devices of a pod that is not here.

The one table for plans, training metrics and benches. Figures of v5e, v5p and v6e: cloud.google.com/tpu/docs, the page
of each generation, read 2026; `usable` of these is what the TPU compiler of libtpu 0.0.42.1 itself allows a program
("available HBM" in its refusals). Those of v4, tpu7x and h100 were not looked up: check them before trusting a plan.
"""

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from thinking_lm.errors import ConfigError


class Chip(NamedTuple):
  """One device as JAX counts them (tpu7x has two a chip, and so has v4 unless asked for one).

  flops: bf16 FLOP/s. usable: bytes of HBM that a program may use. hbm: bytes/s of its memory. ici: bytes/s that it can
  receive over all its links within a slice together, half of the bidirectional figure. dcn: bytes/s over the
  data-centre network. kind: `Device.device_kind`.
  """

  flops: float
  usable: float
  hbm: float
  ici: float
  dcn: float
  kind: str


GIB, GB = 2.0**30, 1e9

CHIPS = dict(
  v4=Chip(275e12 / 2, 15.25 * GIB, 1228 * GB / 2, 135 * GB / 2, 6.25 * GB / 2, "TPU v4"),
  v5e=Chip(197e12, 15.75 * GIB, 819 * GB, 200 * GB, 3.125 * GB, "TPU v5 lite"),
  v5p=Chip(459e12, 95.74 * GIB, 2765 * GB, 600 * GB, 6.25 * GB, "TPU v5"),
  v6e=Chip(918e12, 31.25 * GIB, 1638 * GB, 400 * GB, 12.5 * GB, "TPU v6 lite"),
  tpu7x=Chip(2307e12 / 2, 94.75 * GIB, 7380 * GB / 2, 600 * GB / 2, 12.5 * GB / 2, "TPU7x"),
  h100=Chip(989e12, 79.0 * GIB, 3350 * GB, 450 * GB, 50 * GB, "NVIDIA H100 80GB HBM3"),
)

# What makes libtpu compile without a TPU, beside other processes that hold it, and without waiting for a metadata
# server. The accelerator type only silences it: any topology can be asked for.
QUIET = dict(
  JAX_PLATFORMS="cpu",
  TPU_WORKER_HOSTNAMES="localhost",
  TPU_ACCELERATOR_TYPE="v5litepod-16",
  ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)


def by_kind(kind: str) -> Chip | None:
  """The chip whose devices call themselves so, if the table has it."""
  return next((chip for chip in CHIPS.values() if chip.kind == kind), None)


def peak(devices: Sequence) -> float:
  """bf16 FLOP/s of all devices together; 0 if the table does not know one of them."""
  found = [by_kind(device.device_kind) for device in devices]
  return sum(chip.flops for chip in found) if all(found) else 0.0


def pod(topology: str, slices: int = 1) -> tuple[Chip, list[jax.Device]]:
  """(The chip, the devices) of `NAME:AxB[xC]`, such as v5e:16x16, on a machine that has none of them.

  Raises:
    ConfigError: an unknown name, a shape that no pod has, or libtpu is not installed.
  """
  name, _, shape = topology.partition(":")
  if name not in CHIPS or name == "h100" or not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
    known = ", ".join(known for known in CHIPS if known != "h100")
    raise ConfigError(
      f"topology {topology!r} is not NAME:AxB or NAME:AxBxC with a name of {known}, such as v5e:16x16 (cloud names "
      "count cores: v5p-1024 is v5p:8x8x8)"
    )
  os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
  options = dict(num_slices=slices) if slices > 1 else {}
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
  except Exception as error:  # JaxRuntimeError or RuntimeError, of libtpu or for the lack of it
    reason = " ".join(str(error).split())[:300]
    raise ConfigError(
      f"topology {topology!r} with {slices} slices cannot be had: {reason}; it needs libtpu (`make plan` installs it "
      "into an environment of its own) and a shape that the hosts of 4 chips divide"
    ) from error
  return CHIPS[name], list(found.devices)
