"""Objectives with a past: baselines, teachers, references and several updates, through the whole experiment.

`EVERYTHING` has each of them at once; what it carries must not depend on how a step is cut or when a run is.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.slow import leaving
from thinking_lm import experiment, recipes
from thinking_lm.errors import ConfigError
from thinking_lm.thoughts.topology import rest
from thinking_lm.training import loop
from thinking_lm.training import state as state_lib
from thinking_lm.training.optimizer import make_optimizer
from thinking_lm.training.step import StepConfig, gradients, make_train_step
from thinking_lm.training.writers import read_rows
from thinking_lm.types import Carried

SMALL = {
  **{"data.source": "task", "data.sequence_length": 0, "data.task.length": 4, "data.task.name": "word_problem"},
  **{"data.threads": 0, "model.layers": 1, "model.width": 8, "model.heads": 2, "model.kv_heads": 1},
  **{"train.steps": 4, "train.batch_size": 8, "train.log_every": 1, "train.tensorboard": False},
  "health.every": 0,
}
PAST = {"objective.reward": "info_gain", "objective.teacher_decay": 0.9, "objective.kl_weight": 0.1}
EVERYTHING = PAST | {
  **{"thought.topology": "private", "thought.length": 2, "thought.samples": 2, "thought.lookahead": 2},
  **{"objective.advantage": "value", "objective.baseline_decay": 0.8, "train.updates": 2},
  **{"optimizer.learning_rate": 0.03, "optimizer.eps": 1e-4},
}


def config(recipe="hybrid", **values):
  found = recipes.apply(experiment.default_config(), recipe)
  found.update_from_flattened_dict(SMALL | values)
  return found


def build(recipe="hybrid", **values):
  return experiment.build(experiment.parse(config(recipe, **values)))


def batch(built, step=0):
  return jax.tree.map(jnp.asarray, next(built.data.batches("train", global_batch=8, start_step=step)))


@functools.cache
def stepped(accumulation):
  """(experiment, states of three steps, metrics of the last) of EVERYTHING."""
  built = build(**EVERYTHING)
  run, c = built.run(), built.config
  optimizer = make_optimizer(c.optimizer, built.axes)
  settings = StepConfig(accumulation, updates=c.train.updates)
  step = jax.jit(make_train_step(run.loss_fn, optimizer, lambda s: 0.03, settings, run.carry_update, run.draw_fn))
  states = [state_lib.make_init(run.init_fn, optimizer, False, run.carry_init)(jax.random.key(0))]
  for number in range(3):
    state, metrics = step(states[-1], batch(built, number), jax.random.key(1))
    states.append(state)
  return built, states, metrics


def test_everything_moves_and_is_told():
  _, states, metrics = stepped(1)
  assert sorted(states[-1].extra) == ["reference", "reward_mean", "teacher"]
  first, last = states[0], states[-1]
  assert state_lib.digest(last.extra["reference"]) == state_lib.digest(first.params)
  assert state_lib.digest(last.extra["teacher"]) not in map(state_lib.digest, (first.params, last.params))
  assert float(last.extra["reward_mean"]["weight"]) == pytest.approx(1 - 0.8**6, rel=1e-5)
  assert np.abs(last.params["heads"]["value"]["weight"]).max() > 0
  values = {name: float(mean) for name, mean in metrics.items()}
  assert values["approx_kl"] > 0 and values["kl"] > 0 and 0 <= values["clip_fraction"] < 1
  assert values["ratio"] == pytest.approx(1, abs=0.2) and values["value_explained"] < 1
  assert values["nll_teacher"] != values["nll_base"] and values["skipped"] == 0


def test_what_is_carried_does_not_depend_on_micro_batches():
  (_, whole, told), (_, parts, same) = stepped(1), stepped(4)
  for name, leaf in state_lib.named_leaves(whole[1].extra).items():
    other = state_lib.named_leaves(parts[1].extra)[name]
    np.testing.assert_allclose(other, leaf, rtol=1e-4, atol=2e-5 * np.abs(leaf).max(), err_msg=name)
  assert float(same["value_explained"]) == pytest.approx(float(told["value_explained"]), rel=1e-2)


def crash(step, state):
  if step == 3:
    raise RuntimeError("out of the blue")


def alarms(workdir):
  """(step, name) of what was raised, each once."""
  rows = read_rows(workdir / "metrics.jsonl")
  return [(row["step"], name) for row in rows for name, value in row.items() if name.startswith("alarm_") and value]


def test_a_cut_run_is_the_straight_run_bit_for_bit(tmp_path):
  built = build(**EVERYTHING, **{"checkpoint.every": 2, "health.patience": 3, "health.repeated": 0.1})
  straight = loop.train(built.run(), str(tmp_path / "straight"))
  hook = type("Crash", (), dict(every=1, __call__=lambda self, step, state: crash(step, state)))()
  with pytest.raises(RuntimeError):
    loop.train(dataclasses.replace(built.run(), hooks=[hook]), str(tmp_path / "cut"))
  cut = loop.train(built.run(), str(tmp_path / "cut"))
  assert state_lib.digest(cut) == state_lib.digest(straight)
  # Three readings in a row, the first two of them from before the cut.
  assert alarms(tmp_path / "cut") == alarms(tmp_path / "straight")
  assert {step for step, _ in alarms(tmp_path / "cut")} == {3}
  # Others go on from it: its body without its head, and its policy as the reference.
  values = {"train.steps": 1, "train.init_from": str(tmp_path / "cut"), "objective.kl_weight": 0.1}
  other = build(**values, **{"objective.kl_reference": str(tmp_path / "straight"), "thought.length": 2})
  state = loop.train(other.run(), str(tmp_path / "other"))
  expected = {name: leaf for name, leaf in jax.device_get(cut.params).items() if name != "heads"}
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.extra["reference"]), expected)


def carried(built, params, step=0):
  return Carried(step=jnp.int32(step), extra=built.run().carry_init(params))


@pytest.mark.parametrize("ratio", leaving(["token", "sequence"], ["sequence"]))
def test_the_first_of_several_updates_has_the_plain_gradient(ratio):
  """Thoughts that the same parameters drew have the ratio 1, whatever it is of."""
  built = build(**{"thought.halting": "stop", "thought.length": 3, "objective.ratio": ratio, "train.updates": 2})
  params, rows, key = built.init(jax.random.key(0)), batch(built), jax.random.key(2)
  told = carried(built, params)
  drawn = jax.jit(built.draw)(params, rows, key, told)
  compiled = jax.jit(lambda carried: gradients(built.loss_fn, params, rows, key, 1, carried))
  (plain, before), (again, after) = compiled(told), compiled(told.replace(drawn=drawn))
  scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale), again, plain)
  assert float(after["ratio"]) == pytest.approx(1, abs=1e-5) and float(after["clip_fraction"]) == 0
  assert float(after["approx_kl"]) == pytest.approx(0, abs=1e-5) and "ratio" not in before


def test_a_reference_equal_to_the_policy_has_no_divergence_and_no_pull():
  built, free = build(**{"objective.kl_weight": 5.0}), build()
  params, rows, key = built.init(jax.random.key(0)), batch(built), jax.random.key(2)
  step = lambda params, rows, told, one: gradients(one.loss_fn, params, rows, key, 1, told)
  grads = lambda one: jax.jit(step, static_argnames="one")(params, rows, carried(one, params), one=one)
  (held, metrics), (plain, _) = grads(built), grads(free)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), held, plain)
  assert float(metrics["kl"]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("decay,lookahead", leaving([(0.9, 0), (0.9, 2), (0.0, 2)], [(0.9, 2)]))
def test_persistent_thoughts_are_paid_by_what_is_predicted_without_them(decay, lookahead):
  """By a teacher, or without one by the same model."""
  more = {"objective.kl_weight": 0.0, "objective.teacher_decay": decay, "thought.lookahead": lookahead}
  built = build(**PAST | more)
  params, rows = built.init(jax.random.key(0)), batch(built)
  teacher = built.init(jax.random.key(5)) if decay else params
  told = Carried(extra=dict(teacher=teacher) if decay else {})
  plain = build("none")
  logp_BT = np.asarray(jax.jit(plain.rollout)(teacher, rows, jax.random.key(0)).logp_BGT[:, 0], np.float64)
  beside = jax.jit(built.draw)(params, rows, jax.random.key(2), told)[2]
  np.testing.assert_allclose(beside.plain_logp_BT, logp_BT, rtol=1e-4, atol=1e-5)
  place = built.place(params, rows)
  inside_BNT = np.asarray(rest(rows, place, lookahead))
  for b, n in np.ndindex(*place.anchors_BN.shape):
    expected = sum(logp_BT[b, t] * rows.weights_BT[b, t] for t in np.flatnonzero(inside_BNT[b, n]))
    np.testing.assert_allclose(beside.plain_outcome_BN[b, n], expected, rtol=1e-4, atol=1e-5)
  metrics = jax.jit(built.loss_fn)(params, rows, jax.random.key(2), told)[1]
  trace = jax.jit(built.rollout)(params, rows, jax.random.key(2))
  gain_BGN = np.asarray(trace.outcome_BGN) - np.asarray(beside.plain_outcome_BN)[:, None]
  assert float(metrics["reward"]) == pytest.approx(gain_BGN.mean(), rel=1e-4)
  assert ("nll_teacher" in metrics, "nll_base" in metrics) == (decay > 0, decay == 0)


def test_no_gradient_reaches_what_is_carried_nor_the_body_from_a_value():
  built = build(**(EVERYTHING | {"train.updates": 1}))
  params, rows = built.init(jax.random.key(0)), batch(built)
  params["heads"]["value"]["weight"] = jnp.ones(8)
  told = carried(built, params)
  loss = lambda extra: built.loss_fn(params, rows, jax.random.key(2), told.replace(extra=extra))[0]
  assert all(not leaf.any() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(told.extra)))

  def values(params):
    return jnp.sum(built.rollout(params, rows, jax.random.key(2)).value_BGN)

  slopes = state_lib.named_leaves(jax.jit(jax.grad(values))(params))
  assert {name for name, leaf in slopes.items() if leaf.any()} == {"heads/value/weight", "heads/value/bias"}


RULES = [
  ({"train.updates": 2, "objective.score_weight": 0.0}, "without it, use more steps"),
  ({"objective.teacher_decay": 0.9}, "teacher_decay is read by the rewards that compare with no thought"),
  ({"objective.kl_reference": "somewhere"}, "kl_reference is read where kl_weight is above 0"),
  ({"objective.baseline_decay": 1.0}, "baseline_decay must be below 1"),
  ({"objective.clip_high": 0.2}, "objective.clip_high 0.2 is read where train.updates is above 1"),
  ({"objective.ratio": "sequence"}, "objective.ratio 'sequence' is read where train.updates is above 1"),
  ({"thought.kind": "latent", "thought.samples": 1, "objective.kl_weight": 0.1}, "objective.kl_weight needs thoughts"),
  ({"thought.kind": "noisy", "objective.advantage": "greedy"}, "'greedy' needs thought.kind 'sampled', got 'noisy'"),
  ({"objective.bound": "M", "objective.advantage": "ema", "thought.lookahead": 0}, "'ema' does not credit bound 'M'"),
]


@pytest.mark.parametrize("values,message", RULES)
def test_what_means_nothing_is_refused(values, message):
  with pytest.raises(ConfigError, match=message):
    experiment.parse(config(**values))


@pytest.mark.parametrize("advantage", ["ema", "value", "greedy"])
def test_baselines_from_outside_take_one_sample(advantage):
  built = build(**{"thought.samples": 1, "objective.advantage": advantage, "thought.lookahead": 1})
  params = jax.eval_shape(built.init, jax.random.key(0))
  extra = jax.eval_shape(built.run().carry_init, params)
  loss, metrics = jax.eval_shape(built.loss_fn, params, batch(built), jax.random.key(0), Carried(extra=extra))
  assert loss.shape == () and ("value_explained" in metrics) == (advantage == "value") == ("heads" in params)
