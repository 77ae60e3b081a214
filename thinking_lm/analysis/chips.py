"""What one chip can do, by public figures, and the devices of a pod that is not here.

The one table for plans, training metrics and benches. Sources, as read in 2026:

* v5e, v5p, v6e, tpu7x: docs.cloud.google.com/tpu/docs, the page of each generation (v6e's has v5e's network too: 6.4
  Tbit/s for 256 chips), per chip: bf16 FLOP/s, HBM, half of the bidirectional ICI bandwidth, data-centre network.
* v4: its page there has 275 TFLOP/s, 1200 GB/s and, for all-reduce on 4096 chips, 1.1 PB/s, hence ici. Its data-centre
  network is not stated anywhere that was found; v5p's stands in.
* h100: NVIDIA's data sheet of the SXM5 part: 989 dense bf16 TFLOP/s, 3.35 TB/s, NVLink 900 GB/s in both directions
  together; dcn is one 400 Gbit/s card a GPU, as in a DGX H100. `usable` is an estimate: the 81,559 MiB of nvidia-smi
  less 0.65 GiB for CUDA; JAX takes 75 % of the memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
* h200: the same with the memory of its data sheet, 4.8 TB/s; nvidia-smi has 143,771 MiB.

`usable` of a TPU is what the compiler of libtpu 0.0.42.1 itself allows a program ("available HBM" in its refusals, all
five of them provoked). None of this was checked on a chip.
"""

import os
import platform
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from thinking_lm.errors import ConfigError


class Chip(NamedTuple):
  """One device as JAX counts them: tpu7x has two a chip, the others one.

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
  v4=Chip(275e12, 30.75 * GIB, 1200 * GB, 269 * GB, 6.25 * GB, "TPU v4"),
  v5e=Chip(197e12, 15.75 * GIB, 819 * GB, 200 * GB, 3.125 * GB, "TPU v5 lite"),
  v5p=Chip(459e12, 95.74 * GIB, 2765 * GB, 600 * GB, 6.25 * GB, "TPU v5"),
  v6e=Chip(918e12, 31.25 * GIB, 1638 * GB, 400 * GB, 12.5 * GB, "TPU v6 lite"),
  tpu7x=Chip(2307e12 / 2, 94.75 * GIB, 7380 * GB / 2, 600 * GB / 2, 12.5 * GB / 2, "TPU7x"),
  h100=Chip(989e12, 79.0 * GIB, 3350 * GB, 450 * GB, 50 * GB, "NVIDIA H100 80GB HBM3"),
  h200=Chip(989e12, 139.75 * GIB, 4800 * GB, 450 * GB, 50 * GB, "NVIDIA H200"),
)

# What makes libtpu compile without a TPU, beside other processes that hold it, and without waiting for a metadata
# server. The accelerator type only silences it: any topology can be asked for. The last one lets the GPU compiler do
# without cuDNN.
QUIET = dict(
  JAX_PLATFORMS="cpu",
  TPU_WORKER_HOSTNAMES="localhost",
  TPU_ACCELERATOR_TYPE="v5litepod-16",
  ALLOW_MULTIPLE_LIBTPU_LOAD="1",
  JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
)


def by_kind(kind: str) -> Chip | None:
  """The chip whose devices call themselves so, if the table has it."""
  return next((chip for chip in CHIPS.values() if chip.kind == kind), None)


def peak(devices: Sequence) -> float:
  """bf16 FLOP/s of all devices together; 0 if the table does not know one of them."""
  found = [by_kind(device.device_kind) for device in devices]
  return sum(chip.flops for chip in found) if all(found) else 0.0


HOPPER = """gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }} core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  l2_cache_size: 52428800 memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory}
}}
platform_name: "CUDA"
device_description_str: "{kind}"
"""

# What the GPU compiler must know of a device that is not here, by chip: XLA's GpuTargetConfigProto.
GPU_TARGETS = {
  name: HOPPER.format(bandwidth=CHIPS[name].hbm, memory=memory, kind=CHIPS[name].kind)
  for name, memory in dict(h100=84825604096, h200=150754820096).items()
}


def pod(topology: str, slices: int = 1) -> tuple[Chip, list[jax.Device], int]:
  """(The chip, the devices, `islands`) of a pod on a machine that has none of them.

  Args:
    topology: `NAME:AxB[xC]` chips of a TPU slice, such as v5e:16x16, or h100:HOSTSxGPUS.

  Raises:
    ConfigError: an unknown name, a shape that no pod has, or the compiler is not installed.
  """
  name, _, shape = topology.partition(":")
  if name not in CHIPS or not re.fullmatch(r"\d+x\d+" + ("" if name in GPU_TARGETS else r"(x\d+)?"), shape):
    known = ", ".join(known for known in CHIPS if known not in GPU_TARGETS)
    raise ConfigError(
      f"topology {topology!r} is not NAME:AxB or NAME:AxBxC with a name of {known}, such as v5e:16x16 (cloud names "
      "count cores: v5p-1024 is v5p:8x8x8), nor h100:HOSTSxGPUS or h200:HOSTSxGPUS"
    )
  os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
  try:
    found = (_gpus if name in GPU_TARGETS else _tpus)(name, shape, slices)
  except Exception as error:  # JaxRuntimeError or RuntimeError, of the compiler or for the lack of it
    reason = " ".join(str(error).split())[:300]
    raise ConfigError(f"topology {topology!r} with {slices} slices cannot be had: {reason}; {_needs(name)}") from error
  return CHIPS[name], list(found.devices), islands(topology, slices)


def islands(topology: str, slices: int) -> int:
  """How many groups of devices the data-centre network joins: slices; on GPUs, each host of them."""
  name, _, shape = topology.partition(":")
  return slices * int(shape.split("x")[0]) if name in GPU_TARGETS else slices


def _tpus(name: str, shape: str, slices: int):
  options = dict(num_slices=slices) if slices > 1 else {}
  if name == "v4":  # as a run has them: both cores of a chip as one device
    options["chip_config_name"] = "megacore"
  if shape == "1x1":  # a host with one chip
    options["chips_per_host_bounds"] = [1, 1, 1]
  return topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{shape}", **options)


def _gpus(name: str, shape: str, slices: int):
  return topologies.get_topology_desc(
    platform="cuda", topology_name="", topology=f"{slices}x{shape}", target_config=GPU_TARGETS[name]
  )


def _needs(name: str) -> str:
  if name in GPU_TARGETS:
    return (
      f"it needs a compiler, no GPU: pip install jax-cuda13-plugin=={jax.__version__} into an environment of its own"
    )
  have = (
    "`make plan` installs it into an environment of its own"
    if (platform.system(), platform.machine()) == ("Linux", "x86_64")
    else f"which exists for Linux on x86_64 only, and this is {platform.system()} on {platform.machine()}"
  )
  return f"it needs libtpu ({have}) and a shape that the hosts of 4 chips divide"
