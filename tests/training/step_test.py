import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training import toy
from thinking_lm.metrics import Mean
from thinking_lm.training import state as state_lib
from thinking_lm.training.optimizer import OptimizerConfig, make_optimizer
from thinking_lm.training.step import StepConfig, gradients, make_train_step
from thinking_lm.types import Carried


@pytest.fixture(scope="module")
def params():
  return toy.init(jax.random.key(1))


def batch(step=0, rows=16):
  return toy.Data().rows(np.arange(step * rows, (step + 1) * rows))


def key():
  return state_lib.key(0, "train")


def relative(one, other):
  """Largest difference of two trees, relative to the largest number in them."""
  pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
  return max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs) / max(float(jnp.max(jnp.abs(a))) for a, _ in pairs)


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_gradient_is_that_of_the_weighted_mean_over_the_whole_batch(params, accumulation):
  def mean(params):
    total, metrics = toy.loss_fn(params, batch(), key(), Carried())
    return total / metrics["loss"].count

  grads, metrics = jax.jit(lambda p: gradients(toy.loss_fn, p, batch(), key(), accumulation, Carried()))(params)
  assert relative(jax.jit(jax.grad(mean))(params), grads) < 1e-6
  assert float(metrics["loss"].count) == batch().weights_BT.sum()
  assert float(metrics["real_tokens"].total) == batch().segments_BT.sum()


def test_micro_batches_differ_in_their_token_counts():
  # Otherwise the test above could not tell a mean of means from the mean.
  counts = batch().weights_BT.sum(axis=1).reshape(-1, 8).sum(axis=0)
  assert len(set(counts.tolist())) > 1


def test_a_batch_without_a_token_gives_zero_gradients(params):
  empty = batch().replace(weights_BT=np.zeros_like(batch().weights_BT))
  grads, _ = gradients(toy.loss_fn, params, empty, key(), 1, Carried())
  assert all(not jnp.any(g) for g in jax.tree.leaves(grads))


def poisoned(where):
  """The toy loss, but in the steps of the rows from 16 up to 64 its value or one gradient is not a number."""

  def loss_fn(params, rows, key, carried):
    bad = (rows.ids_B[0] >= 16) & (rows.ids_B[0] < 64)
    if where == "gradient":
      # d sqrt(x) / dx at 0 is infinite, and infinity times 0 is not a number; the value stays finite.
      total, metrics = toy.loss_fn(params, rows, key, carried)
      return total + jnp.sqrt(jnp.where(bad, 0.0, 1.0) * params["layers"]["norm"][0, 0] ** 2), metrics
    total, metrics = toy.loss_fn(params, rows, key, carried)
    factor = jnp.where(bad, jnp.nan, 1.0)
    return total * factor, dict(metrics, loss=Mean(metrics["loss"].total * factor, metrics["loss"].count))

  return loss_fn


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_no_bit_and_is_counted(params, where):
  optimizer = make_optimizer(OptimizerConfig(name="muon"), toy.AXES)
  config = StepConfig(accumulation=2, ema=0.9)
  step = jax.jit(make_train_step(poisoned(where), optimizer, optax.constant_schedule(0.01), config))
  states = [state_lib.create(params, optimizer, ema=True)]
  rows = []
  for number in range(5):
    state, metrics = step(states[-1], batch(number), key())
    states.append(state)
    rows.append({name: float(mean) for name, mean in metrics.items()})
  kept = [state_lib.digest((s.params, s.opt_state, s.ema)) for s in states]
  assert kept[1] == kept[2] == kept[3] == kept[4]
  assert kept[0] != kept[1] and kept[4] != kept[5]
  assert [int(s.step) for s in states] == [0, 1, 2, 3, 4, 5]
  assert [int(s.skips.consecutive) for s in states] == [0, 0, 1, 2, 3, 0]
  assert [int(s.skips.total) for s in states] == [0, 0, 1, 2, 3, 3]
  assert [row["skipped"] for row in rows] == [0, 1, 1, 1, 0]
  assert np.isfinite(rows[-1]["grad_norm"]) and np.isfinite(rows[-1]["loss"])


def test_the_update_is_the_direction_times_the_rate_of_this_step(params):
  optimizer = optax.identity()
  schedule = lambda step: 0.1 * (step + 1)
  step = jax.jit(make_train_step(toy.loss_fn, optimizer, schedule, StepConfig(ema=0.75)))
  state = state_lib.create(params, optimizer, ema=True).replace(step=jnp.int32(3))
  new, metrics = step(state, batch(), key())
  grads, _ = gradients(toy.loss_fn, params, batch(), jax.random.fold_in(key(), 3), 1, Carried())
  expected = jax.tree.map(lambda p, g: p - 0.4 * g, params, grads)
  assert relative(expected, new.params) < 1e-6
  assert relative(jax.tree.map(lambda p, q: 0.75 * p + 0.25 * q, params, expected), new.ema) < 1e-6
  assert float(metrics["learning_rate"]) == pytest.approx(0.4)
  assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)
  assert float(metrics["update_norm"]) == pytest.approx(0.4 * float(optax.tree.norm(grads)), rel=1e-5)


def test_metrics_of_the_loss_cannot_hide_those_of_the_step(params):
  def loss_fn(params, rows, key, carried):
    total, metrics = toy.loss_fn(params, rows, key, carried)
    return total, dict(metrics, grad_norm=metrics["loss"])

  optimizer = optax.identity()
  step = make_train_step(loss_fn, optimizer, optax.constant_schedule(1.0), StepConfig())
  with pytest.raises(ValueError, match="grad_norm"):
    step(state_lib.create(params, optimizer, ema=False), batch(), key())


def counting(params, rows, key, carried):
  """The toy loss, and how much was carried to it."""
  total, metrics = toy.loss_fn(params, rows, key, carried)
  told = dict(seen=Mean(carried.extra["total"], jnp.float32(1)), step=Mean(jnp.float32(carried.step), jnp.float32(1)))
  return total, metrics | told


def count_up(extra, params, metrics, step):
  """The running sum of the batch's loss and step, and a copy of the parameters one step old."""
  return dict(total=extra["total"] + metrics["loss"].total + step, copy=params, still=extra["still"])


@pytest.mark.parametrize("accumulation", [1, 4])
def test_what_is_carried_reaches_the_loss_and_moves_with_the_whole_batch(params, accumulation):
  optimizer = optax.identity()
  step = jax.jit(make_train_step(counting, optimizer, optax.constant_schedule(0.1), StepConfig(accumulation), count_up))
  init = lambda params: dict(total=jnp.float32(5), copy=jax.tree.map(jnp.zeros_like, params), still=jnp.int32(7))
  state = state_lib.create(params, optimizer, False, init)
  expected = 5.0
  for number in range(3):
    state, metrics = step(state, batch(number), key())
    assert float(metrics["seen"]) == pytest.approx(expected, rel=1e-6)
    assert float(metrics["step"]) == number
    expected += float(metrics["loss"].total) + number
    assert float(state.extra["total"]) == pytest.approx(expected, rel=1e-6)
    assert state_lib.digest(state.extra["copy"]) == state_lib.digest(state.params)
  assert int(state.extra["still"]) == 7


def test_a_skipped_step_carries_nothing_on(params):
  update = lambda extra, params, metrics, step: dict(total=metrics["loss"].total)
  step = jax.jit(make_train_step(poisoned("loss"), optax.identity(), lambda s: 0.1, StepConfig(), update))
  state = state_lib.create(params, optax.identity(), False, lambda params: dict(total=jnp.float32(1)))
  seen = []
  for number in range(3):
    state, _ = step(state, batch(number), key())
    seen.append(float(state.extra["total"]))
  assert seen[0] == seen[1] == seen[2] != 1


def drawing(params, rows, key, carried):
  """A number for each row, of the parameters, the key and what is carried."""
  noise_B = jax.vmap(lambda id_: jax.random.normal(jax.random.fold_in(key, id_)))(rows.ids_B)
  return dict(row_B=noise_B + params["head"][0, 0] + carried.extra["total"] + carried.step)


def told(params, rows, key, carried):
  """The toy loss, its rows weighted by what was drawn for them."""
  heavy = rows.replace(weights_BT=rows.weights_BT * (1 + carried.drawn["row_B"][:, None] ** 2))
  return toy.loss_fn(params, heavy, key, carried)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_several_updates_on_what_was_drawn_once(params, accumulation):
  optimizer, rate = optax.scale_by_adam(), 0.02
  update = lambda extra, params, metrics, step: dict(total=extra["total"] + metrics["loss"].total / 1000)
  init = lambda params: dict(total=jnp.float32(0.5))
  config = StepConfig(accumulation, ema=0.9, updates=3)
  step = jax.jit(make_train_step(told, optimizer, lambda s: rate, config, update, drawing))
  state = state_lib.create(params, optimizer, True, init).replace(step=jnp.int32(2))
  new, metrics = step(state, batch(), key())

  step_key = jax.random.fold_in(key(), 2)
  drawn = drawing(params, batch(), step_key, Carried(step=2, extra=state.extra))
  total, opt_state, average, losses = jnp.float32(0.5), optimizer.init(params), params, []
  for _ in range(3):
    grads, found = gradients(told, params, batch(), step_key, 1, Carried(2, dict(total=total), drawn))
    direction, opt_state = optimizer.update(grads, opt_state)
    params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
    average = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, average, params)
    total += found["loss"].total / 1000
    losses.append(found["loss"])
  assert relative(params, new.params) < 1e-4 and relative(average, new.ema) < 1e-4
  assert float(new.extra["total"]) == pytest.approx(float(total), rel=1e-4)
  assert int(new.step) == 3 and int(new.opt_state.count) == 3
  expected = sum(float(loss.total) for loss in losses) / sum(float(loss.count) for loss in losses)
  assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-4)
  assert float(metrics["real_tokens"].total) == batch().segments_BT.sum(), (
    "a row is read once, however often it updates"
  )


def test_updates_that_are_not_finite_are_counted_one_by_one(params):
  config = StepConfig(updates=2)
  step = jax.jit(make_train_step(poisoned("loss"), optax.identity(), lambda s: 0.01, config))
  state = state_lib.create(params, optax.identity(), False)
  for number, skips in enumerate([(0, 0), (2, 2), (4, 4), (6, 6), (0, 6)]):
    state, metrics = step(state, batch(number), key())
    assert (int(state.skips.consecutive), int(state.skips.total)) == skips
    assert float(metrics["skips_in_a_row"].total) == skips[0] and float(metrics["skipped"]) == (skips[0] > 0)
