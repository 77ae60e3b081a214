"""Checkpoints: Orbax writes the arrays, a manifest of ours says that all of them are there and unharmed.

    checkpoints/120/arrays/...        what Orbax wrote
    checkpoints/120/manifest.json     written last, atomically: size and SHA-256 of every file, shape and type of every
                                      leaf, digests of config and data. A step exists if and only if it verifies.
    checkpoints/120/unfinished        there while a step is being written or deleted: without a manifest beside it, it
                                      marks remains of ours that may go. Nothing else is ever deleted.
    checkpoints/120.corrupt-...       a damaged step, moved aside

Orbax restores flipped bits, other shapes and other types without a word, so none of these is left to it.
"""

import concurrent.futures
import dataclasses
import json
import os
import re
import time
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from thinking_lm.config import option
from thinking_lm.errors import ConfigError, DataError, DivergedError, SaveError
from thinking_lm.training import storage
from thinking_lm.training.state import named_leaves

ARRAYS, MANIFEST, UNFINISHED = "arrays", "manifest.json", "unfinished"
STEP_NAME = re.compile(r"0|[1-9][0-9]{0,9}")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When to save and what to keep. The last step of a run is always saved."""

  every: int = option(100, "steps between checkpoints", low=1)
  keep_last: int = option(2, "newest checkpoints to keep; more than one is the way out if the newest is damaged", low=1)
  keep_every: int = option(0, "also keep the steps that this divides, for ever; 0 = none", low=0)


def schema(tree: Any) -> dict[str, list]:
  """Name -> [shape, type] of every leaf."""
  return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in named_leaves(tree).items()}


def verify(directory: epath.Path) -> dict[str, Any]:
  """The manifest of a step, after every byte it speaks of was read and found right.

  Raises:
    DataError: what is wrong, without the path of the step.
  """
  manifest = read_manifest(directory)
  present = {os.fspath(path.relative_to(directory)): path for path in _files(directory / ARRAYS)}
  wrong = sorted(present.keys() ^ manifest["files"].keys())
  if wrong:
    raise DataError(f"{'unexpected' if wrong[0] in present else 'missing'} file {wrong[0]}")

  def check(name):
    size, digest = manifest["files"][name]
    if present[name].stat().length != size:
      return f"{name} has {present[name].stat().length} bytes, not {size}"
    return None if storage.sha256_file(present[name]) == digest else f"{name} has other bytes than were written"

  with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
    faults = [fault for fault in pool.map(check, sorted(present)) if fault]
  if faults:
    raise DataError("; ".join(faults))
  return manifest


def read_manifest(directory: epath.Path) -> dict[str, Any]:
  """The manifest of a step, if it is whole; the arrays are not looked at. Raises DataError."""
  path = directory / MANIFEST
  if not path.exists():
    raise DataError("no manifest")
  try:
    text = path.read_text()
    manifest = json.loads(text)
    seal = manifest.pop("sha256")
    whole = storage.canonical({**manifest, "sha256": seal}) == text
    whole = whole and storage.sha256(storage.canonical(manifest)) == seal
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise DataError(f"unreadable manifest ({error})") from error
  if not whole:
    raise DataError("the manifest was altered")
  return manifest


def _files(directory: epath.Path) -> list[epath.Path]:
  """Every file below `directory`. A link is refused: it could lead anywhere, and would not be copied along."""
  found = []
  for path in sorted(directory.iterdir()) if directory.exists() else ():
    if storage.is_local(path) and os.path.islink(path):
      raise DataError(f"{path.name} is a link")
    found.extend(_files(path) if path.is_dir() else [path])
  return found


def list_steps(directory: epath.Path) -> list[int]:
  """Steps that have a directory, ascending, verified or not; other people's files are not looked at."""
  if not directory.exists():
    return []
  names = [path.name for path in directory.iterdir() if STEP_NAME.fullmatch(path.name) and path.is_dir()]
  return sorted(int(name) for name in names)


def survey(directory: epath.Path) -> tuple[int | None, dict[int, str]]:
  """(The newest step that verifies or None, damaged newer step -> what is wrong with it). Changes nothing.

  Raises:
    DataError: there are or were steps, and none verifies.
  """
  damaged = {}
  for step in reversed(list_steps(directory)):
    try:
      verify(directory / str(step))
      return step, damaged
    except DataError as error:
      damaged[step] = str(error)
  moved = sorted(path.name for path in directory.glob("*.corrupt-*")) if directory.exists() else []
  if damaged or moved:
    lines = [f"no checkpoint in {directory} is intact:"]
    lines += [f"  step {step}: {reason}" for step, reason in damaged.items()]
    lines += [f"  {name}: moved aside earlier" for name in moved]
    raise DataError("\n".join([*lines, "put back a good copy, or choose another --workdir to start afresh"]))
  return None, {}


def read_params(directory, abstract: Any, averaged: bool = False) -> tuple[int, Any]:
  """(Step, parameters) of the newest intact checkpoint, for readers: nothing is locked, moved or written.

  Args:
    directory: the run's `checkpoints` directory.
    abstract: the parameters as ShapeDtypeStructs; with shardings, they are placed so.
    averaged: the moving average instead of the parameters themselves.

  Raises:
    DataError: there is no intact checkpoint.
    ConfigError: as of `load`.
  """
  directory = epath.Path(directory)
  step, _ = survey(directory)
  if step is None:
    raise DataError(f"there is no checkpoint in {directory}; train first")
  return step, load(directory / str(step), abstract, "ema/" if averaged else "params/")


def load(directory: epath.Path, abstract: Any, prefix: str = "", spare: Collection[str] = ()) -> Any:
  """The arrays of one verified step, as the tree `abstract` of ShapeDtypeStructs, whose shardings they get.

  prefix: the place of `abstract` within the saved state, for a reader that wants only a part (`params/`).
  spare: names below `prefix` that may be there although `abstract` has none.

  Raises:
    ConfigError: one line for every leaf that is missing, unknown or of another shape or type.
  """
  saved = read_manifest(directory)["schema"]
  wanted = {prefix + name: leaf for name, leaf in named_leaves(abstract).items()}
  ignored = {prefix + name for name in spare} - wanted.keys()
  saved = {name: shape for name, shape in saved.items() if name.startswith(prefix) and name not in ignored}
  _compare(directory, saved, {prefix + name: shape for name, shape in schema(abstract).items()})
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  with context:
    arrays = ocp.load(directory / ARRAYS, wanted)
  return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])


def _compare(directory: epath.Path, saved: Mapping[str, list], wanted: Mapping[str, list]) -> None:
  faults = []
  for name in sorted(saved.keys() | wanted.keys()):
    if saved.get(name) != wanted.get(name):
      show = [f"{leaf[1]}{leaf[0]}" if leaf else "nothing" for leaf in (saved.get(name), wanted.get(name))]
      faults.append(f"  {name}: the checkpoint has {show[0]}, the config asks for {show[1]}")
  if faults:
    raise ConfigError([f"checkpoint {directory} is not of this config:", *faults])


class Checkpoints:
  """The checkpoints of one run, in one directory that this run has locked.

  Args:
    directory: created when the first step is saved.
    config: when and what to keep.
    identity: what goes into every manifest, and what a checkpoint must agree with to be restored: name -> text, for
      instance the data's digest.

  Attributes:
    record: what goes into every manifest for the reader only (code version, config).
    committed: the newest step that is known to be restorable.
    fallbacks: damaged steps that were passed over.
  """

  def __init__(self, directory, config: CheckpointConfig, identity: Mapping[str, str]):
    self.directory = epath.Path(directory)
    self.config = config
    self._identity = dict(identity)
    self.record: dict[str, Any] = {}
    self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
    self._saving: tuple[int, concurrent.futures.Future] | None = None
    self.committed: int | None = None
    self.fallbacks = 0

  def path(self, step: int) -> epath.Path:
    """The directory of a step."""
    return self.directory / str(step)

  def clear_remains(self) -> None:
    """Removes what an interrupted save or deletion of ours left."""
    for step in list_steps(self.directory):
      path = self.path(step)
      empty = not any(path.iterdir())
      if empty or ((path / UNFINISHED).exists() and not (path / MANIFEST).exists()):
        logging.warning("removing %s: writing or deleting it was interrupted", path)
        self._remove(path)

  def newest(self) -> int | None:
    """The newest step that verifies; None if there never was one. Damaged newer ones are moved aside, loudly.

    Raises:
      DataError: there are steps, and none verifies. Then nothing is moved: a second start must not begin afresh.
    """
    step, damaged = survey(self.directory)
    for bad, reason in damaged.items():
      self._quarantine(bad, reason, step)
    return step

  def _quarantine(self, step: int, reason: str, fallback: int) -> None:
    aside = self.directory / f"{step}.corrupt-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    logging.error("CHECKPOINT %d IS DAMAGED (%s): moved to %s, going on from step %d", step, reason, aside, fallback)
    self.path(step).rename(aside)
    self.fallbacks += 1

  def restore(self, abstract: Any) -> Any | None:
    """The state of the newest intact step, with the shardings of `abstract` whatever mesh it was saved from, or None.

    Raises:
      DataError: as of `newest`.
      ConfigError: the step was written for another model, optimizer or data set.
    """
    step = -1
    if jax.process_index() == 0:
      self.clear_remains()
      newest = self.newest()
      step = -1 if newest is None else newest
    if jax.process_count() > 1:
      step = int(multihost_utils.broadcast_one_to_all(jnp.int32(step)))
    if step < 0:
      return None
    manifest = read_manifest(self.path(step))
    faults = [
      f"{name} of checkpoint {self.path(step)} is {manifest['identity'].get(name)!r}, now it is {value!r}"
      for name, value in self._identity.items()
      if manifest["identity"].get(name) != value
    ]
    if faults:
      raise ConfigError(faults)
    state = load(self.path(step), abstract)
    self.committed = step
    return state

  def due(self, step: int) -> bool:
    """Whether the config asks for a checkpoint after `step` finished steps."""
    return step % self.config.every == 0

  def save(self, step: int, state: Any) -> None:
    """Starts to save `state` as `step`; returns when the arrays are copied, and not before an earlier save is done.

    Raises:
      SaveError: this save could not start, or the earlier one failed.
      DivergedError: parameters are not finite; such a state is never saved.
    """
    self.wait()
    if not bool(_all_finite(state.params)):
      raise DivergedError(
        f"the parameters of step {step} are not finite; they are not saved, the last good step is {self.committed}"
      )
    path = self.path(step)
    try:
      if jax.process_index() == 0:
        if path.exists():
          raise FileExistsError(f"{path} is in the way")
        path.mkdir(parents=True)
        (path / UNFINISHED).write_text("")
      if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"checkpoint {step}")
      response = ocp.save_async(path / ARRAYS, named_leaves(state))
    except Exception as error:
      raise SaveError(f"cannot save {path}: {error}") from error
    self._saving = step, self._pool.submit(self._commit, step, response, schema(state))

  def _commit(self, step: int, response, leaves: dict[str, list]) -> None:
    """Waits for the arrays of all processes, then makes the step exist; runs beside the training."""
    response.result()
    if jax.process_index() != 0:
      return
    path = self.path(step)
    files = {}
    for file in _files(path / ARRAYS):
      storage.fsync(file)
      files[os.fspath(file.relative_to(path))] = [file.stat().length, storage.sha256_file(file)]
    manifest = dict(self.record, step=step, files=files, schema=leaves, identity=self._identity)
    manifest["sha256"] = storage.sha256(storage.canonical(manifest))
    storage.write_atomic(path / MANIFEST, storage.canonical(manifest))
    (path / UNFINISHED).unlink()
    self._discard_old()

  def _discard_old(self) -> None:
    """Deletes the steps that the config does not keep, counting only those that have a manifest."""
    steps = [step for step in list_steps(self.directory) if (self.path(step) / MANIFEST).exists()]
    for step in steps[: -self.config.keep_last]:
      if self.config.keep_every and step % self.config.keep_every == 0:
        continue
      path = self.path(step)
      (path / UNFINISHED).write_text("")
      (path / MANIFEST).unlink()
      self._remove(path)

  def _remove(self, path: epath.Path) -> None:
    """Removes an unfinished step; its mark goes last, so that an interruption leaves remains that are known as ours."""
    if (path / ARRAYS).exists():
      (path / ARRAYS).rmtree()
    for rest in path.iterdir():
      if rest.name != UNFINISHED:
        rest.rmtree() if rest.is_dir() else rest.unlink()
    (path / UNFINISHED).unlink(missing_ok=True)
    if path.exists():  # in an object store, a directory is gone with the last file in it
      path.rmdir()

  def check(self) -> None:
    """Raises SaveError as soon as a save is known to have failed; called at every step."""
    if self._saving is not None and self._saving[1].done():
      self.wait()

  def wait(self) -> None:
    """Returns when nothing is being saved any more.

    Raises:
      SaveError: the save failed; the last committed step is untouched.
    """
    if self._saving is None:
      return
    step, future = self._saving
    self._saving = None
    try:
      future.result()
    except Exception as error:
      raise SaveError(f"saving {self.path(step)} failed: {error}; the last good step is {self.committed}") from error
    self.committed = step

  def close(self) -> None:
    """Lets a save that is under way end, and takes note of how; for the end of a run, whatever ended it."""
    try:
      self.wait()
    except SaveError as error:
      logging.error("%s", error)
    self._pool.shutdown()


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
