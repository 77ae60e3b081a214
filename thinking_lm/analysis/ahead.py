"""Compiles what a run would run, for devices that are not here, and says what the compiler found.

Nothing is read, initialised or executed: the arguments are ShapeDtypeStructs with the run's own shardings.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from thinking_lm.analysis import collectives
from thinking_lm.evaluation.evaluators import Runner
from thinking_lm.training import loop
from thinking_lm.training.mesh import abstract_batch, placed, replicated
from thinking_lm.training.mesh import shardings as parameter_shardings
from thinking_lm.training.state import key as random_key

LEVELS = ("O1", "default")
"""XLA's optimisation levels, in the order that they are tried: O1 compiles several times faster and needs about a fifth
more memory, so that what fits there fits, and what does not is tried again as the run would compile it."""

_UNITS = dict(K=2**10, M=2**20, G=2**30, T=2**40)
_NEEDED = re.compile(
  r"(?:HLO temporaries \(|Used )([\d.]+)([KMGT])\w*\)?(?: exceeds available HBM \(| of )([\d.]+)([KMGT])"
)


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of one function. All bytes are of one device.

  level: as of LEVELS. arguments: bytes of what is passed in, by category. temporaries: what the peak adds to them.
  peak: the compiler's own peak, or what it says it would have needed. collectives, unknown_loops: as of
  `collectives.read`; None and 0 where it does not fit. seconds: of the process, to lower and compile. fingerprint: as
  of `fingerprint`.
  """

  fits: bool
  level: str
  arguments: Mapping[str, int]
  temporaries: int
  peak: int
  collectives: Mapping[str, collectives.Collective]
  unknown_loops: int
  seconds: float
  fingerprint: str


@dataclasses.dataclass(frozen=True)
class Part:
  """A function of a run, and its abstract arguments by category."""

  lower: Callable[[], jax.stages.Lowered]
  arguments: Mapping[str, Any]


def needed(error: Exception) -> int | None:
  """Bytes that a refused program would have needed; None of any other error."""
  found = _NEEDED.search(str(error))
  return int(float(found[1]) * _UNITS[found[2]]) if found else None


def device_bytes(tree: Any) -> int:
  """Bytes that one device holds of abstract arrays with shardings."""

  def size(leaf):
    kind = leaf.dtype
    width = 8 if jax.dtypes.issubdtype(kind, jax.dtypes.prng_key) else np.dtype(kind).itemsize
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * width

  return sum(map(size, jax.tree.leaves(tree)))


def train(built: Any, mesh: Mesh) -> Part:
  """The training step of an Experiment: loss, gradient, optimizer, exactly as `loop.train` compiles it."""
  made = loop.program(built.run(mesh), mesh)
  state = made.state
  batch = abstract_batch(mesh, built.config.train.batch_size, built.data.sequence_length)
  carried = dict(ema=state.ema, other=(state.extra, state.skips, state.step))
  arguments = dict(parameters=state.params, optimizer=state.opt_state, **carried, batch=batch)
  return Part(lambda: made.step.lower(state, batch, _key(mesh, "train")), arguments)


def evaluate(built: Any, mesh: Mesh) -> Part:
  """Evaluation: the model thinks, once an anchor, and its targets are scored with those thoughts.

  A run does these one after the other, in two programs; here they are one, which needs at least as much.
  """
  c = built.config
  batch = abstract_batch(mesh, c.evaluation.batch_size or c.train.batch_size, built.data.sequence_length)
  params, runner = _parameters(built, mesh), Runner(built)

  def both(params, batch, key):
    thoughts = built.rollout(params, batch, key, thought=runner.thought).thoughts
    return runner.score(params, batch, key, thoughts)

  def lower():
    if not runner.thought.length:
      return runner.without.lower(params, batch)
    return jax.jit(both).lower(params, batch, _key(mesh, "evaluate"))

  return Part(lower, dict(parameters=params, batch=batch))


def generate(built: Any, mesh: Mesh, sampling: Any, rows: int, prompt: int) -> Part:
  """Cached decoding of `rows` prompts of `prompt` tokens; its loop ends when all are done: trips are unknown."""
  params, prompts = _parameters(built, mesh), abstract_batch(mesh, rows, prompt)
  lower = lambda: built.decode(sampling).lower(params, prompts, key=_key(mesh, "generate"))
  return Part(lower, dict(parameters=params, batch=prompts))


COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin")
"""Packages whose version a compiled program may depend on, where they are installed."""

OPTIONS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Environment variables that it may depend on."""


def fingerprint(lowered: jax.stages.Lowered, mesh: Mesh) -> str:
  """A digest of all that a compiler is given: the program, the devices in their order, its version and its options.

  What has the same fingerprint compiles to the same thing and need not be compiled again, as long as LEVELS, which all
  parts share, stays what it is.
  """
  kinds = sorted({device.device_kind for device in mesh.devices.flat})
  devices = [[device.id, getattr(device, "slice_index", 0)] for device in mesh.devices.flat]
  versions = {name: importlib.metadata.version(name) for name in COMPILERS if _installed(name)}
  facts = json.dumps([versions, {name: os.environ.get(name, "") for name in OPTIONS}, kinds, devices])
  return hashlib.sha256(f"{facts}\n{lowered.as_text()}".encode()).hexdigest()


def _installed(name: str) -> bool:
  return any(True for _ in importlib.metadata.distributions(name=name))


def compiled(
  part: Part,
  mesh: Mesh,
  usable: float,
  levels: tuple[str, ...] = LEVELS,
  within: int = 0,
  known: str | None = None,
) -> Compiled | None:
  """Compiles at the first of the levels where the part fits into `usable` bytes, or at the last one.

  The TPU compiler refuses what does not fit; the GPU compiler only says what it would need. within: as of
  `collectives.read`. known: a fingerprint; if the part has it, nothing is compiled, and None returned.
  """
  arguments = {name: device_bytes(tree) for name, tree in part.arguments.items()}
  given = sum(arguments.values())
  start = time.process_time()
  with jax.set_mesh(mesh):
    lowered = part.lower()
  mark = fingerprint(lowered, mesh)
  if mark == known:
    return None
  for level in levels:
    with _optimization(level), jax.set_mesh(mesh):
      try:
        program = lowered.compile()
        memory = program.memory_analysis()
      except jax.errors.JaxRuntimeError as error:
        peak = needed(error)
        if peak is None:
          raise
        continue
    peak = getattr(memory, "peak_memory_in_bytes", 0) or given + memory.temp_size_in_bytes
    if peak > usable:
      continue
    found, unknown = collectives.read(program.as_text(), within)
    seconds = time.process_time() - start
    return Compiled(True, level, arguments, max(peak - given, 0), peak, found, unknown, seconds, mark)
  return Compiled(False, level, arguments, max(peak - given, 0), peak, {}, 0, time.process_time() - start, mark)


@contextlib.contextmanager
def _optimization(level: str):
  before = jax.config.jax_optimization_level
  jax.config.update("jax_optimization_level", before if level == "default" else level)
  try:
    yield
  finally:
    jax.config.update("jax_optimization_level", before)


def _parameters(built, mesh):
  return placed(built.model.shapes, parameter_shardings(built.axes, built.model.shapes, mesh))


@functools.cache
def _key(mesh, purpose):
  key = jax.eval_shape(lambda: random_key(0, purpose))
  return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
