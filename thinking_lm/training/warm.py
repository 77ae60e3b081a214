"""The state before the first step, with the parameters of another run in place of fresh ones where wanted."""

from typing import Any

import jax
from absl import logging

from thinking_lm import types
from thinking_lm.errors import DataError
from thinking_lm.training import workdir
from thinking_lm.training.checkpoint import load, survey, verify
from thinking_lm.training.state import TrainState, key, named_leaves


def start(path: str, params: types.Params, optional: tuple[str, ...] = ()) -> types.Params:
  """`params` with the values that the newest intact checkpoint of the work directory `path` has for these names.

  Parameters whose names begin with one of `optional` may be missing there, and keep their fresh values, or be there
  only, and are left out; both are said. Every other parameter must be in both, of one shape.

  Raises:
    DataError: there is no intact checkpoint. ConfigError: one line for every parameter that does not fit.
  """
  directory = workdir.resolve(path) / "checkpoints"
  step, _ = survey(directory)
  if step is None:
    raise DataError(f"there is no checkpoint in {directory} to start from")
  schema = verify(directory / str(step))["schema"]
  saved = {name.removeprefix("params/") for name in schema if name.startswith("params/")}
  leaves = named_leaves(params)
  fresh = {name for name in leaves.keys() - saved if name.startswith(optional)}
  spare = {name for name in saved - leaves.keys() if name.startswith(optional)}
  wanted = {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    for name, leaf in leaves.items()
    if name not in fresh
  }
  loaded = load(directory / str(step), wanted, "params/", spare)
  logging.warning("starting from the parameters of step %d of %s", step, path)
  for names, what in ((fresh, "not there, and fresh"), (spare, "there only, and left out")):
    if names:
      logging.warning("parameters that are %s: %s", what, ", ".join(sorted(names)))
  values = [loaded.get(name, leaf) for name, leaf in leaves.items()]
  return jax.tree.unflatten(jax.tree.structure(params), values)


def first_params(train: Any, init_fn: Any, optional: tuple[str, ...], shardings: Any) -> types.Params:
  """The parameters before the first step of a run; train: its `loop.TrainConfig`. Raises what `start` does."""
  params = jax.jit(init_fn, out_shardings=shardings)(key(train.seed, "init"))
  return start(train.init_from, params, optional) if train.init_from else params


def first_state(run: Any, made: Any) -> TrainState:
  """The state before the first step of a `loop.Run`, whose `loop.Program` was made."""
  if run.train.init_from:
    params = first_params(run.train, run.init_fn, run.optional, made.shardings.params)
    state = jax.jit(made.create, out_shardings=made.shardings)(params)
  else:
    state = jax.jit(made.init, out_shardings=made.shardings)(key(run.train.seed, "init"))
  copies = {name: start(path, state.extra[name], run.optional) for name, path in run.carry_from.items()}
  return state.replace(extra=state.extra | copies)
