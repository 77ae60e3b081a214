"""What would fit a pod, for a plan that does not: other remat, micro-batches, mesh or rows, what costs least first."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from thinking_lm.analysis import ahead, pods
from thinking_lm.analysis.chips import GIB
from thinking_lm.analysis.training import rematerialises
from thinking_lm.training.mesh import device_faults, make_mesh

WORK = dict(train="training", generate="decoding", evaluate="evaluation")


def advice(plan: pods.Plan, search: bool, sketch: Callable[[Any], Any], devices: Sequence, decode: pods.Decode) -> str:
  """One line: what does not fit by how much, and what would.

  Args:
    search: compile alternatives until one fits, for each part that does not. sketch: an Experiment of a config.
  """
  tight = {name: part for name, part in plan.parts.items() if not part.fits}
  lacks = ", ".join(f"{name} needs {part.peak / GIB:.1f} GiB" for name, part in tight.items())
  lacks += f" of {plan.chip.usable / GIB:.2f} GiB a device"
  if not search:
    return f"{lacks}; --fit looks for remat, micro-batches, mesh or rows that fit"
  return "; ".join([lacks, *(_search(name, plan, sketch, devices, decode) for name in tight)])


def _search(name: str, plan: pods.Plan, sketch: Callable, devices: Sequence, decode: pods.Decode) -> str:
  for words, config, decoded in SEARCHES[name](plan.config, decode, plan.devices):
    built, mesh = sketch(config), make_mesh(config.mesh, devices)
    part = pods.program(name, built, mesh, decoded)
    found = ahead.compiled(part, mesh, plan.chip.usable, ahead.LEVELS[:1])
    if found.fits:
      return f"{words} does for {WORK[name]}, with {found.peak / GIB:.1f} GiB"
  return f"nothing that was tried does for {WORK[name]}: a smaller model, shorter rows or a longer thought.stride may"


def alternatives(config: Any, decode: pods.Decode, devices: int) -> Iterator[tuple[str, Any, pods.Decode]]:
  """(how to say it, config, decode) of what may fit when training, what costs least first.

  That is remat where it plays a part, micro-batches, fsdp instead of data, tensor instead of fsdp, fewer rows. Each
  keeps remat and the micro-batches of those before it; the batch is the last thing to change, because it changes what
  is learned.
  """
  words = []
  if config.model.remat != "full" and rematerialises(config):
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))
    words.append("model.remat=full")
    yield words[-1], config, decode
  while not _faults(more := _train(config, accumulation=config.train.accumulation * 2), devices):
    config = more
    yield " ".join([*words, f"train.accumulation={config.train.accumulation}"]), config, decode
  split = config.mesh.data * config.mesh.fsdp
  if config.mesh.data > 1 and config.mesh.fsdp > 0:
    wide = _train(_mesh(config, data=1, fsdp=split), accumulation=1)
    yield " ".join([*words, f"mesh.data=1 mesh.fsdp={split}"]), wide, decode
  for mesh, narrow in _narrower(config):
    yield " ".join([*words, mesh, f"train.accumulation={narrow.train.accumulation}"]), narrow, decode
  while not _faults(less := _train(config, batch_size=config.train.batch_size // 2, accumulation=1), devices):
    config = less
    yield " ".join([*words, f"train.batch_size={config.train.batch_size}"]), config, decode


def fewer_prompts(config: Any, decode: pods.Decode, devices: int) -> Iterator[tuple[str, Any, pods.Decode]]:
  """The same of decoding: fewer prompts at once, then a wider tensor axis, which splits the weights."""
  while decode.rows > 1 and not device_faults(config.mesh, decode.rows // 2, 1, devices):
    decode = decode._replace(rows=decode.rows // 2)
    yield f"--rows={decode.rows}", config, decode
  for mesh, narrow in _narrower(config):
    yield f"{mesh} --rows={decode.rows}" if decode.rows else mesh, narrow, decode


def fewer_rows(config: Any, decode: pods.Decode, devices: int) -> Iterator[tuple[str, Any, pods.Decode]]:
  """The same of evaluation: fewer rows at once, then a wider tensor axis."""
  rows = config.evaluation.batch_size or config.train.batch_size
  while rows > 1 and not device_faults(config.mesh, rows // 2, 1, devices):
    rows //= 2
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, batch_size=rows))
    yield f"evaluation.batch_size={rows}", config, decode
  for mesh, narrow in _narrower(config):
    yield f"{mesh} evaluation.batch_size={rows}", narrow, decode


SEARCHES = dict(train=alternatives, generate=fewer_prompts, evaluate=fewer_rows)


def _narrower(config: Any) -> Iterator[tuple[str, Any]]:
  """(how to say it, config) with ever more of fsdp given to tensor; micro-batches grow with the rows of a device."""
  heads = config.model.resolved_kv_heads
  while config.mesh.fsdp % 2 == 0 and config.mesh.tensor > 0 and heads % (2 * config.mesh.tensor) == 0:
    config = _mesh(config, fsdp=config.mesh.fsdp // 2, tensor=config.mesh.tensor * 2)
    config = _train(config, accumulation=config.train.accumulation * 2)
    yield f"mesh.fsdp={config.mesh.fsdp} mesh.tensor={config.mesh.tensor}", config


def _mesh(config: Any, **options: int) -> Any:
  return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **options))


def _train(config: Any, **options: int) -> Any:
  return dataclasses.replace(config, train=dataclasses.replace(config.train, **options))


def _faults(config, devices: int) -> list[str]:
  return device_faults(config.mesh, config.train.batch_size, config.train.accumulation, devices)
