"""The training step: gradients of a sum over the global batch, one division, and an update only if all is finite."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from thinking_lm import types
from thinking_lm.metrics import Mean
from thinking_lm.sharding import each_copy
from thinking_lm.training.state import Skips, TrainState

LossFn = Callable[[types.Params, types.Batch, jax.Array, types.Carried], tuple[jax.Array, dict[str, Mean]]]
"""(params, batch, key, carried) -> (sum of the losses, metrics); `metrics['loss'].count` divides the sum."""

DrawFn = Callable[[types.Params, types.Batch, jax.Array, types.Carried], Any]
"""(params, batch, key, carried) -> what `Carried.drawn` says in every update of a step, drawn once before the first."""

TOKENS = ("real_tokens", "think_tokens")
"""Metrics whose totals over all rows are meant, not means."""

CarryFn = Callable[[dict[str, Any], types.Params, dict[str, Mean], jax.Array], dict[str, Any]]
"""(extra, new parameters, metrics, step) -> the extra of the next step. The metrics are sums over the global batch."""

StepFn = Callable[[TrainState, types.Batch, jax.Array], tuple[TrainState, dict[str, Mean]]]


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """accumulation: micro-batches of an update. ema: decay of the averaged parameters per update, 0 for none.
  updates: how often a step updates on its rows; with one, nothing is drawn beforehand.
  """

  accumulation: int = 1
  ema: float = 0.0
  updates: int = 1


def _split(batch: Any, parts: int) -> Any:
  """[B, ...] -> [parts, B / parts, ...]. Micro-batch a takes the rows a, a + parts, ...: a device, which holds
  consecutive rows, then has the same share of each micro-batch and nothing travels.
  """

  def split(rows):
    return rows.reshape(rows.shape[0] // parts, parts, *rows.shape[1:]).swapaxes(0, 1)

  return jax.tree.map(split, batch)


def _draw(draw_fn: DrawFn, params: types.Params, batch: types.Batch, key, accumulation: int, carried: types.Carried):
  """What `draw_fn` draws for all rows, micro-batch by micro-batch."""
  draw = lambda rows: jax.lax.stop_gradient(draw_fn(params, rows, key, carried))
  if accumulation == 1:
    return draw(batch)
  parts = jax.lax.map(draw, _split(batch, accumulation))
  return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:]), parts)


def unchanged(extra, params, metrics, step):
  """The CarryFn of an objective that carries nothing, or nothing that moves."""
  del params, metrics, step
  return extra


def gradients(
  loss_fn: LossFn,
  params: types.Params,
  batch: types.Batch,
  key: jax.Array,
  accumulation: int,
  carried: types.Carried,
):
  """(gradient of the mean loss, metrics) over the whole batch.

  Sums of gradients and counts are added over the micro-batches and divided once by the global count (1 if that is
  0), so that the result does not depend on how the rows are cut. `key` is the same for all micro-batches: the loss
  derives its randomness from `batch.ids_B`. What was drawn is cut like the rows.
  """

  def part(rows, common):
    (batch, drawn), (params, key, carried) = rows, common
    (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key, carried.replace(drawn=drawn))
    return grads, metrics

  def parts(rows, common):
    if accumulation == 1:
      return part(rows, common)
    cut = _split(rows, accumulation)
    shapes = jax.eval_shape(part, jax.tree.map(lambda x: x[0], cut), common)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    add = lambda total, rows: (jax.tree.map(jnp.add, total, part(rows, common)), None)
    return jax.lax.scan(add, zeros, cut)[0]

  common = (params, key, carried.replace(drawn=None))
  grads, metrics = each_copy(parts)((batch, carried.drawn), common)
  metrics |= {name: Mean(metrics[name].total, jnp.ones(())) for name in TOKENS if name in metrics}
  count = jnp.maximum(metrics["loss"].count, 1.0)
  return jax.tree.map(lambda g: g / count, grads), metrics


def _select(good: jax.Array, new: Any, old: Any) -> Any:
  """`new` where `good`, else `old`, bit for bit: a product with 0 would let a NaN through."""
  return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)


def _update(loss_fn, optimizer, carry_update, config, rate, state, batch, key, drawn):
  """(The state after one update, or that before it if this was not finite; metrics). `step` is left as it is."""
  carried = types.Carried(step=state.step, extra=state.extra, drawn=drawn)
  grads, metrics = gradients(loss_fn, state.params, batch, key, config.accumulation, carried)
  directions, opt_state = optimizer.update(grads, state.opt_state, state.params)
  updates = jax.tree.map(lambda d: -rate * d, directions)
  params = optax.apply_updates(state.params, updates)
  norms = dict(
    grad_norm=optax.tree.norm(grads), update_norm=optax.tree.norm(updates), param_norm=optax.tree.norm(params)
  )
  good = jnp.isfinite(metrics["loss"].total)
  for norm in norms.values():
    good &= jnp.isfinite(norm)
  ema = state.ema
  if config.ema:
    ema = jax.tree.map(lambda e, p: config.ema * e + (1 - config.ema) * p, state.ema, params)
  bad = (~good).astype(jnp.int32)
  skips = Skips((state.skips.consecutive + 1) * bad, state.skips.total + bad)
  extra = carry_update(state.extra, params, metrics, state.step)
  new = dict(params=params, opt_state=opt_state, ema=ema, extra=extra)
  kept = _select(good, new, {name: getattr(state, name) for name in new})
  scalars = dict(norms, learning_rate=rate, skipped=bad, skips_in_a_row=skips.consecutive)
  own = {name: Mean(jnp.asarray(x, jnp.float32), jnp.float32(1)) for name, x in scalars.items()}
  clash = own.keys() & metrics.keys()
  if clash:
    raise ValueError(f"the loss function's metrics use the step's names {sorted(clash)}")
  return state.replace(skips=skips, **kept), {**metrics, **own}


def make_train_step(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  config: StepConfig,
  carry_update: CarryFn = unchanged,
  draw_fn: DrawFn | None = None,
) -> StepFn:
  """(state, batch, key) -> (state, metrics).

  key: of the purpose `train`; step s uses fold_in(key, s), in all its updates.
  With `config.updates` above 1, `draw_fn` draws once with the parameters before the step, and that many updates follow
  on the same rows, at the same learning rate, each told what was drawn.
  An update is applied only if the loss and the norms of the gradient, the update and the new parameters are finite.
  If not, parameters, optimizer state, EMA and `extra` keep their bits, `state.skips` counts it, and `step` advances all
  the same (so the next step sees other data).
  Metrics: those of `loss_fn` (of `TOKENS` the totals), and grad_norm (before clipping), update_norm (as applied),
  param_norm, learning_rate, skipped (0 or 1), skips_in_a_row. Of several updates, sums and counts are averaged;
  skips_in_a_row is the last.
  """

  def train_step(state: TrainState, batch: types.Batch, key: jax.Array):
    key = jax.random.fold_in(key, state.step)
    rate = jnp.asarray(schedule(state.step), jnp.float32)

    def update(state, drawn):
      return _update(loss_fn, optimizer, carry_update, config, rate, state, batch, key, drawn)

    if config.updates == 1:
      state, metrics = update(state, None)
    else:
      carried = types.Carried(step=state.step, extra=state.extra)
      drawn = _draw(draw_fn, state.params, batch, key, config.accumulation, carried) if draw_fn else None
      state, metrics = jax.lax.scan(lambda state, _: update(state, drawn), state, length=config.updates)
      last = jax.tree.map(lambda x: x[-1], metrics["skips_in_a_row"])
      metrics = {**jax.tree.map(lambda x: x.mean(axis=0), metrics), "skips_in_a_row": last}
    return state.replace(step=state.step + 1), metrics

  return train_step
