import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training import toy
from thinking_lm import config as config_lib
from thinking_lm.errors import ConfigError
from thinking_lm.training.optimizer import (
  OPTIMIZERS,
  SCHEDULES,
  OptimizerConfig,
  changed_rates,
  make_optimizer,
  make_schedule,
  muon_dimensions,
  schedule_faults,
)

PEAK, STEPS, WARMUP, DECAY, FINAL = 0.3, 100, 10, 30, 0.1


def closed_form(name, step):
  if step < WARMUP:
    return PEAK * (step + 1) / WARMUP
  part = min(max(step - (STEPS - DECAY), 0) / DECAY, 1.0)
  shape = dict(
    constant=1.0, cosine=FINAL + (1 - FINAL) * (1 + math.cos(math.pi * part)) / 2, wsd=1 - (1 - FINAL) * part
  )
  return PEAK * shape[name]


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_their_closed_forms(name):
  config = OptimizerConfig(
    learning_rate=PEAK, schedule=name, warmup_steps=WARMUP, decay_steps=DECAY, final_fraction=FINAL
  )
  got = [float(make_schedule(config, STEPS)(step)) for step in range(STEPS + 5)]
  np.testing.assert_allclose(got, [closed_form(name, step) for step in range(STEPS + 5)], rtol=1e-5)


@pytest.mark.parametrize("name, first", [("constant", 101), ("cosine", 0), ("wsd", 80)])
def test_without_decay_steps_the_schedule_says_where_the_decay_begins(name, first):
  schedule = make_schedule(OptimizerConfig(learning_rate=1.0, schedule=name, final_fraction=0.0), 100)
  rates = np.array([float(schedule(step)) for step in range(101)])
  below = np.flatnonzero(rates < 1.0)
  assert (below[0] if len(below) else 102) == first + 1
  assert name == "constant" or rates[100] == pytest.approx(0.0, abs=1e-7)


def test_a_schedule_may_span_other_steps_than_the_run():
  config = OptimizerConfig(schedule="cosine", warmup_steps=3, schedule_steps=20)
  steps = np.arange(40)
  np.testing.assert_allclose(make_schedule(config, 40)(steps), make_schedule(config, 20)(steps))
  np.testing.assert_allclose(make_schedule(config, 40)(steps[20:]), 1e-4, rtol=1e-5)
  assert schedule_faults(dataclasses.replace(config, warmup_steps=21), 40) == [
    "optimizer.warmup_steps 21 and decay_steps 0 do not fit into schedule_steps 20"
  ]


@pytest.mark.parametrize(
  "name, finished, refused",
  [("constant", 100, False), ("cosine", 100, True), ("cosine", 2, False), ("wsd", 100, True), ("wsd", 80, False)],
)
def test_more_steps_must_not_change_the_rates_of_finished_ones(name, finished, refused):
  config = OptimizerConfig(schedule=name, warmup_steps=2)
  faults = changed_rates((config, 100), (config, 200), finished)
  assert len(faults) == refused
  if refused:
    assert "optimizer.schedule_steps=100 keeps" in faults[0] and f"(step {4 if name == 'cosine' else 82}: " in faults[0]
  kept = dataclasses.replace(config, schedule_steps=100)
  assert changed_rates((config, 100), (kept, 200), finished) == []
  assert changed_rates((kept, 200), (kept, 300), finished) == []


def test_a_schedule_longer_than_the_run_is_a_fault():
  assert schedule_faults(OptimizerConfig(warmup_steps=60, decay_steps=40), 100) == []
  (line,) = schedule_faults(OptimizerConfig(warmup_steps=60, decay_steps=41), 100)
  assert "60" in line and "41" in line and "100" in line


def test_faults_of_the_section_are_all_listed():
  with pytest.raises(ConfigError) as error:
    config_lib.parse(OptimizerConfig, dict(b1=1.0, ema=1.0))
  assert [("b1" in line, "ema" in line) for line in error.value.faults] == [(True, False), (False, True)]
  with pytest.raises(ConfigError, match=r"unknown name 'muonn'; known: adamw, muon"):
    config_lib.parse(OptimizerConfig, dict(name="muonn"))


def directions(name, grads, params, axes=toy.AXES, **options):
  config = OptimizerConfig(**dict(dict(name=name, weight_decay=0.0, clip_norm=0.0), **options))
  optimizer = make_optimizer(config, axes)
  return jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]


@pytest.fixture(scope="module")
def params():
  return toy.init(jax.random.key(1))


@pytest.fixture(scope="module")
def grads(params):
  return jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_direction_descends(name, params, grads):
  found = directions(name, grads, params)
  for direction, grad in zip(jax.tree.leaves(found), jax.tree.leaves(grads), strict=True):
    assert float(jnp.vdot(direction, grad)) > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_is_on_matrices_and_embeddings_only(name, params, grads):
  without = directions(name, grads, params)
  with_decay = directions(name, grads, params, weight_decay=0.5)
  added = jax.tree.map(lambda a, b: a - b, with_decay, without)
  for path in (("embed",), ("head",), ("layers", "up"), ("layers", "down")):
    one, param = added, params
    for part in path:
      one, param = one[part], param[part]
    np.testing.assert_allclose(one, 0.5 * param, rtol=1e-3, atol=1e-5)
  assert not jnp.any(added["layers"]["norm"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping_bounds_what_the_rule_sees(name, params, grads):
  # Adam's epsilon, made large, shows the scale of the gradient that reaches it.
  options = dict(clip_norm=1.0, eps=1.0)
  small = directions(name, grads, params, **options)["embed"]
  large = directions(name, jax.tree.map(lambda g: 1000 * g, grads), params, **options)["embed"]
  np.testing.assert_allclose(small, large, rtol=1e-4)


def test_muon_orthogonalises_every_layer_on_its_own(params, grads):
  found = directions("muon", grads, params)["layers"]
  axes = {"up": ("embed", "mlp"), "down": ("mlp", "embed")}
  for name, layer_axes in axes.items():
    for layer in range(toy.L):
      one = directions(
        "muon", dict(w=grads["layers"][name][layer]), dict(w=params["layers"][name][layer]), dict(w=layer_axes)
      )["w"]
      np.testing.assert_allclose(found[name][layer], one, rtol=1e-4, atol=1e-6)
      singular = np.linalg.svd(np.asarray(one), compute_uv=False) / (0.2 * math.sqrt(max(one.shape)))
      assert singular.min() > 0.5 and singular.max() < 1.4  # about 1: the quintic iteration stops in this band


def test_muon_leaves_embeddings_head_and_norms_to_adam(params, grads):
  muon = directions("muon", grads, params)
  for axes, leaf in ((("vocab", "embed"), muon["embed"]), (("embed", "vocab"), muon["head"])):
    assert muon_dimensions(axes) is None
    # Adam's first step is the sign of the gradient; with Nesterov momentum it has one common size other than 1.
    sizes = np.abs(np.asarray(leaf))
    np.testing.assert_allclose(sizes, sizes.mean(), rtol=1e-3)
  assert muon_dimensions(("layers", "embed")) is None


@pytest.mark.parametrize(
  "axes, reduction, output",
  [
    (("embed", "embed"), (0,), (1,)),
    (("layers", "embed", "mlp"), (1,), (2,)),
    (("layers", "mlp", "embed"), (1,), (2,)),
    (("layers", "embed", "heads", "head_dim"), (1,), (2, 3)),
    (("layers", "heads", "head_dim", "embed"), (1, 2), (3,)),
  ],
)
def test_muon_takes_several_heads_as_one_side_of_the_matrix(axes, reduction, output):
  found = muon_dimensions(axes)
  assert (found.reduction_axis, found.output_axis) == (reduction, output)
