"""The state of a run: one pytree that holds everything which affects what comes next."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from thinking_lm import types
from thinking_lm.training import mesh as mesh_lib

PURPOSES = dict(init=0, train=1, evaluate=2, generate=3)
"""What a random key is for: keys of different purposes never meet."""


@struct.dataclass
class Skips:
  """Steps whose update was not finite and therefore not applied; int32 scalars."""

  consecutive: jax.Array
  total: jax.Array


@struct.dataclass
class TrainState:
  """Everything that affects the future of a run, besides its config and its data.

  step: int32 number of finished steps. It is also the position in the data, in the schedule and in the stream of
    random keys, so that these can never disagree.
  params: float32 parameters.
  opt_state: what the optimizer remembers.
  ema: the averaged copy of the parameters, or None.
  skips: see `Skips`.
  extra: what an objective carries from step to step (running baselines, copies of the parameters), by name.
  """

  step: jax.Array
  params: types.Params
  opt_state: optax.OptState
  ema: types.Params | None
  skips: Skips
  extra: dict[str, Any]


def key(seed: int, purpose: str) -> jax.Array:
  """The key of one purpose of the run with this seed.

  Always threefry: other generators do not give the same numbers when a computation is batched or split differently.
  """
  return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), PURPOSES[purpose])


CarryInit = Callable[[types.Params], dict[str, Any]]
"""Parameters before the first step -> TrainState.extra before it."""


def nothing(params: types.Params) -> dict[str, Any]:
  """The CarryInit of an objective that carries nothing."""
  del params
  return {}


def create(
  params: types.Params, optimizer: optax.GradientTransformation, ema: bool, carry_init: CarryInit = nothing
) -> TrainState:
  """The state before the first step. Works under `jax.eval_shape`."""
  zero = jnp.zeros((), jnp.int32)
  return TrainState(
    step=zero,
    params=params,
    opt_state=optimizer.init(params),
    ema=jax.tree.map(jnp.copy, params) if ema else None,
    skips=Skips(consecutive=zero, total=zero),
    extra=carry_init(params),
  )


def shardings(abstract: TrainState, axes: Any, mesh: Mesh) -> TrainState:
  """A NamedSharding for every leaf of the state.

  Whatever has the place and the shape of a parameter within the optimizer state (moments, momentum), the EMA or a copy
  in `extra` is split like that parameter; everything else is replicated.
  """
  params = mesh_lib.shardings(axes, abstract.params, mesh)
  known = {
    path: (leaf.shape, sharding)
    for (path, leaf), sharding in zip(
      jax.tree_util.tree_leaves_with_path(abstract.params), jax.tree.leaves(params), strict=True
    )
  }
  whole = mesh_lib.replicated(mesh)

  def of(path, leaf):
    for start in range(len(path)):
      shape, sharding = known.get(path[start:], (None, None))
      if shape == leaf.shape:
        return sharding
    return whole

  return jax.tree_util.tree_map_with_path(of, abstract)


def make_init(
  init_fn: Callable[[jax.Array], types.Params],
  optimizer: optax.GradientTransformation,
  ema: bool,
  carry_init: CarryInit = nothing,
) -> Callable[[jax.Array], TrainState]:
  """The function key -> state before the first step; `init_fn` gives the parameters for a key."""
  return lambda init_key: create(init_fn(init_key), optimizer, ema, carry_init)


def named_leaves(tree: Any) -> dict[str, Any]:
  """The leaves by path, as `params/blocks/w`: names that do not depend on the classes which hold the leaves."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def digest(tree: Any) -> str:
  """SHA-256 over the names, types, shapes and bytes of all leaves: equal if and only if the states are."""
  total = hashlib.sha256()
  for name, leaf in sorted(named_leaves(tree).items()):
    array = np.ascontiguousarray(jax.device_get(leaf))
    total.update(f"{name}:{array.dtype}:{array.shape};".encode())
    total.update(array.tobytes())
  return total.hexdigest()
