"""The objective as a whole: which gradient it expects, what that is divided by, what is refused, how it is extended."""

import dataclasses
import functools
import pathlib
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.objectives import bandit
from thinking_lm import experiment, recipes
from thinking_lm.errors import ConfigError
from thinking_lm.objectives.advantages import ADVANTAGES
from thinking_lm.objectives.objective import ObjectiveConfig, objective
from thinking_lm.objectives.rewards import REWARDS
from thinking_lm.objectives.scores import score
from thinking_lm.training.state import make_init
from thinking_lm.training.step import StepConfig, make_train_step
from thinking_lm.types import Beside, Carried


def flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def expected_gradient(config, G):
  """Of -loss, over all groups of G thoughts of the tables."""
  assert not config.faults()
  rows = bandit.groups(G)

  def expected(params):
    one = lambda row: objective(config, jax.tree.map(lambda a: a[None], row))[0]
    return -(bandit.weights(params, rows) * jax.vmap(one)(bandit.trace(params, rows))).sum()

  with jax.enable_x64(True):
    return flat(jax.jit(jax.grad(expected))(bandit.parameters()))


def exact_gradient(value):
  with jax.enable_x64(True):
    return flat(jax.jit(jax.grad(value))(bandit.parameters()))


def expected_value(of):
  """Parameters -> E_z of(z, log p(y | z)) summed over contexts, with `of` held fixed: a score term's gradient."""

  def value(params):
    logs_CZ = jax.lax.stop_gradient(bandit.outcomes(params))
    reward_CZ = jax.lax.stop_gradient(of(np.arange(bandit.Z)[None], logs_CZ, params))
    return (jax.nn.softmax(params["policy_CZ"]) * reward_CZ).sum()

  return value


def hits(params):
  """1 where both targets are the most likely tokens, [C, Z]."""
  return bandit.target_logp(params, bandit.groups(1))[1].all(axis=2).reshape(bandit.C, bandit.Z)


def extras(z, logs, params):
  """0.7 times the Brier score of what each thought reports, less 0.5 a think token, [C, Z]."""
  del logs, params
  report = bandit.report(bandit.groups(1))
  score_BGN = score("brier", report) * report.weight_BN[:, None]
  return 0.7 * score_BGN.reshape(bandit.C, bandit.Z) - 0.5 * (z % 3 + 1)


SCORE = dict(nll_weight=0.0, score_weight=1.0)
EXTRAS = dict(price=0.5, calibration_weight=0.7)
GRADIENTS = dict(
  J=(dict(), lambda p: bandit.exact(p)["J"]),
  J_info_gain=(dict(reward="info_gain"), lambda p: bandit.exact(p)["J"]),
  J_none=(dict(advantage="none"), lambda p: bandit.exact(p)["J"]),
  P=(dict(bound="P", reward="prob"), lambda p: bandit.exact(p)["P"]),
  P_none=(dict(bound="P", reward="prob", advantage="none"), lambda p: bandit.exact(p)["P"]),
  M_vimco=(dict(bound="M", advantage="vimco"), lambda p: bandit.sampled_bound(p, 2)),
  M_jepo=(dict(bound="M", advantage="jepo"), lambda p: bandit.sampled_bound(p, 2)),
  M_extras=(
    EXTRAS | dict(bound="M", advantage="jepo"),
    lambda p: bandit.sampled_bound(p, 2) + expected_value(extras)(p),
  ),
  price=(SCORE | dict(price=0.5), expected_value(lambda z, logs, p: logs - 0.5 * (z % 3 + 1))),
  exact_match=(SCORE | dict(reward="exact_match"), expected_value(lambda z, logs, p: hits(p).astype(float))),
  entropy=(
    dict(entropy_weight=0.3),
    lambda p: bandit.exact(p)["J"] + 0.3 * jax.scipy.special.entr(jax.nn.softmax(p["policy_CZ"])).sum(),
  ),
  nothing_to_think=(
    dict(nll_weight=0.0, base_weight=1.0, score_weight=0.0),
    lambda p: bandit.trace(p, bandit.groups(1)[:: bandit.Z]).base_logp_BT.sum(),
  ),
)


@pytest.mark.parametrize("name", GRADIENTS)
def test_expected_gradients(name):
  options, value = GRADIENTS[name]
  got, wanted = expected_gradient(ObjectiveConfig(**(dict(score_weight=1.0) | options)), 2), exact_gradient(value)
  np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_one_term_alone_is_not_the_gradient():
  wanted = exact_gradient(lambda p: bandit.exact(p)["J"])
  for options in (dict(), SCORE):
    got = expected_gradient(ObjectiveConfig(**options), 2)
    assert np.linalg.norm(got - wanted) > 0.1 * np.linalg.norm(wanted)


def test_an_entropy_bonus_can_fall_to_nothing_in_a_line():
  trace = bandit.traced(bandit.groups(2)[::5])
  loss = lambda step=0, **options: float(objective(ObjectiveConfig(**options), trace, step=jnp.int32(step))[0])
  none, whole = loss(), loss(entropy_weight=0.3)
  assert none - whole > 1
  for step, share in {0: 1.0, 25: 0.75, 100: 0.0, 300: 0.0}.items():
    got = none - loss(step, entropy_weight=0.3, entropy_steps=100)
    np.testing.assert_allclose(got, share * (none - whole), rtol=1e-4, atol=1e-4)
  assert ObjectiveConfig(entropy_steps=5).faults() == ["entropy_steps is read where entropy_weight is above 0"]


def measured(config, rows):
  """(gradient of the loss, count) of some rows of the tables."""
  with jax.enable_x64(True):
    loss = lambda params: objective(config, bandit.trace(params, rows))
    grads, metrics = jax.jit(jax.grad(loss, has_aux=True))(bandit.parameters())
  return flat(grads), {name: (float(mean.total), float(mean.count)) for name, mean in metrics.items()}


def test_dapo_is_grpo_averaged_over_the_groups_that_vary():
  rows = bandit.groups(2)[::5]
  varied = rows[:, 1] != rows[:, 2]
  assert 0 < varied.sum() < len(rows)
  grpo, dapo = (measured(ObjectiveConfig(**SCORE, advantage=name), rows) for name in ("grpo", "dapo"))
  assert grpo[1]["loss"][1] == 2 * len(rows)  # two targets a row
  assert dapo[1]["loss"][1] == 2 * varied.sum()
  np.testing.assert_allclose(dapo[1]["flat_groups"], [len(rows) - varied.sum(), len(rows)])
  np.testing.assert_allclose(dapo[0], grpo[0], rtol=1e-9, atol=1e-12)  # the sums; the step divides them by the counts


def test_dapo_holds_every_term_to_the_groups_that_vary():
  """A group that is left out of the average pulls at nothing: no entropy bonus, however many such groups there are."""
  rows = bandit.groups(2)[::5]
  varied = rows[:, 1] != rows[:, 2]
  config = lambda name: ObjectiveConfig(**SCORE, advantage=name, entropy_weight=0.3)
  kept = measured(config("grpo"), rows[varied])
  for found in (measured(config("dapo"), rows), measured(config("dapo"), rows[varied])):
    np.testing.assert_allclose(found[0], kept[0], rtol=1e-9, atol=1e-12)
    assert found[1]["loss"] == pytest.approx(kept[1]["loss"])
  assert not measured(config("dapo"), rows[~varied])[0].any() and measured(config("grpo"), rows[~varied])[0].any()


@pytest.mark.parametrize("name,pulls", [("dapo", False), ("grpo", True)])
def test_a_reference_pulls_at_no_group_that_dapo_leaves_out(name, pulls):
  rows = bandit.groups(2)
  config = ObjectiveConfig(**SCORE, advantage=name, kl_weight=0.5)

  def loss(params):
    trace = bandit.trace(params, rows[rows[:, 1] == rows[:, 2]])
    tokens_BGNJ = trace.policy_logp_BGN[..., None]
    trace = trace.replace(token_logp_BGNJ=tokens_BGNJ, chosen_BGNJ=jnp.ones(tokens_BGNJ.shape, bool))
    return objective(config, trace, Beside(reference_logp_BGNJ=jnp.full(tokens_BGNJ.shape, -1.0)))[0]

  with jax.enable_x64(True):
    assert flat(jax.jit(jax.grad(loss))(bandit.parameters())).any() == pulls


def test_the_floor_of_a_group_is_the_configs():
  """Of its z-scores, of the groups that stay, and of those that are told as flat."""
  with jax.enable_x64(True):
    trace = bandit.traced(bandit.groups(2)[:2])
    trace = trace.replace(outcome_BGN=jnp.array([[-2.0, -2.0004], [-2.0, -3.0]])[:, :, None])
    told = lambda name, floor: objective(ObjectiveConfig(**SCORE, advantage=name, std_floor=floor), trace)[1]
    for floor, flat_groups, kept, size in ((1e-3, 1, 2, 0.6), (1e-5, 0, 4, 1.0)):
      assert float(told("grpo", floor)["flat_groups"].total) == flat_groups
      assert float(told("dapo", floor)["loss"].count) == kept
      assert float(told("grpo", floor)["advantage_abs"].total) == pytest.approx(4 * size, rel=1e-6)


def test_dapo_filters_groups_that_hardly_vary():
  with jax.enable_x64(True):
    trace = bandit.traced(bandit.groups(2)[:2])
    trace = trace.replace(outcome_BGN=jnp.array([[-2.0, -2.0001], [-2.0, -3.0]])[:, :, None])
    loss = lambda logp, name: objective(ObjectiveConfig(**SCORE, advantage=name), trace.replace(policy_logp_BGN=logp))[
      0
    ]
    slope = lambda name: jax.jit(jax.grad(loss), static_argnums=1)(trace.policy_logp_BGN, name)[:, :, 0]
    np.testing.assert_allclose(slope("dapo"), [[0, 0], [-0.5, 0.5]], rtol=1e-9)
    assert np.abs(slope("grpo")[0]).min() > 0


@pytest.mark.parametrize("name", ["leave_one_out", "dapo"])
def test_parts_of_a_batch_add_up(name):
  config, rows = ObjectiveConfig(**SCORE, advantage=name), bandit.groups(2)[::7]
  whole, *parts = (measured(config, part) for part in (rows, rows[:4], rows[4:]))
  np.testing.assert_allclose(parts[0][0] + parts[1][0], whole[0], rtol=1e-9, atol=1e-12)
  for metric, mean in whole[1].items():
    np.testing.assert_allclose(np.add(parts[0][1][metric], parts[1][1][metric]), mean, rtol=1e-6)


def test_thoughts_that_do_not_exist_are_neither_paid_nor_counted():
  with jax.enable_x64(True):
    trace = bandit.traced(bandit.groups(2)[:5])
    pad = lambda a, axis: np.concatenate([a, np.zeros_like(a)], axis=axis)
    padded = trace.replace(
      **{name: pad(getattr(trace, name), 2) for name in ("outcome_BGN", "policy_logp_BGN", "entropy_BGN", "used_BGN")},
      **{name: pad(getattr(trace, name), 1) for name in ("valid_BN", "base_outcome_BN", "ahead_weights_BNA")},
      ahead_logp_BGNA=pad(trace.ahead_logp_BGNA, 2),
      outcome_hit_BGN=pad(trace.outcome_hit_BGN, 2),
      unit_BN=np.broadcast_to(np.arange(2), (5, 2)),
    )
    for options in (
      dict(),
      dict(bound="M", advantage="vimco"),
      dict(bound="P", reward="prob"),
      SCORE | dict(advantage="dapo"),
    ):
      config = ObjectiveConfig(**(dict(score_weight=1.0) | options), entropy_weight=0.1)
      of = jax.jit(functools.partial(objective, config))
      for got, wanted in zip(*map(jax.tree.leaves, (of(padded), of(trace))), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-9)


FAULTS = [
  (dict(bound="P"), "bound 'P' pays for prob, got reward 'log_prob'"),
  (dict(bound="M", advantage="vimco", reward="exact_match"), "bound 'M' pays for log_prob or info_gain"),
  (dict(bound="M"), "'leave_one_out' does not credit bound 'M', whose score term needs one of: vimco, jepo"),
  (dict(advantage="vimco"), "'vimco' does not credit bound 'J', whose score term needs one of: none, mean"),
  (dict(advantage="dapo"), "which the NLL terms do not share"),
  (dict(nll_weight=0.0, score_weight=0.0), "nothing to learn"),
  (dict(score_weight=0.0, advantage="grpo"), "advantage 'grpo' is read by the score term, whose score_weight is 0"),
  (dict(score_weight=0.0, reward="exact_match"), "reward 'exact_match' is read by the score term"),
  (dict(score_weight=0.0, std_floor=0.1), "std_floor 0.1 is read by the score term"),
  (dict(kl_estimator="k1"), "kl_estimator 'k1' is read where kl_weight is above 0"),
  (dict(value_weight=1.0), "value_weight is read by advantage 'value', got 'leave_one_out'"),
]


@pytest.mark.parametrize("options,message", FAULTS)
def test_what_means_nothing_is_refused(options, message):
  config = ObjectiveConfig(**(dict(score_weight=1.0) | options))
  assert len(config.faults()) == 1 and message in config.faults()[0]
  if config.nll_weight:
    left = dataclasses.replace(config, score_weight=0.0).faults()
    assert all(" is read " in fault for fault in left), "and no mismatch"


SAMPLED = {"thought.kind": "sampled", "thought.length": 1, "thought.samples": 2}
THOUGHT_FAULTS = [
  (SAMPLED | {"objective.bound": "M"}, "thought.lookahead 0 .the rest of the document., got 1"),
  ({"objective.entropy_weight": 0.1}, "objective.entropy_weight needs thoughts with a log-probability"),
  (SAMPLED | {"objective.entropy_weight": 0.1, "thought.temperature": 0.0}, "entropy_weight needs thought.temperature"),
  (SAMPLED | {"objective.score_weight": 1.0, "thought.samples": 1}, "samples of at least 2, got 1"),
]


@pytest.mark.parametrize("values,message", THOUGHT_FAULTS)
def test_what_the_thoughts_cannot_give_is_refused(values, message):
  config = experiment.default_config()
  config.update_from_flattened_dict(values)
  with pytest.raises(ConfigError, match=message):
    experiment.parse(config)


def small(recipe, **options):
  config = recipes.apply(experiment.default_config(), recipe)
  config.update_from_flattened_dict(
    {"data.source": "task", "data.sequence_length": 0, "data.task.length": 4, "data.task.name": "word_problem"}
    | {"model.layers": 1, "model.width": 8, "model.heads": 2, "model.kv_heads": 1}
    | options
  )
  return config


def test_rows_too_short_for_a_thought_have_all_their_terms():
  options = {"thought.placement": "stride", "thought.topology": "private", "objective.base_weight": 1.0}
  built = experiment.build(
    experiment.parse(small("hybrid", **options, **{"objective.reward": "info_gain", "thought.lookahead": 2}))
  )
  batch = next(built.data.batches("train", global_batch=2))
  loss, metrics = jax.eval_shape(built.loss_fn, built.model.shapes, batch, jax.random.key(0), Carried())
  assert loss.shape == () and "nll_base" in metrics


def test_an_advantage_and_a_reward_are_a_function_and_a_line_each():
  """README's example as it stands there: ten lines, and then it trains."""
  readme = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
  (example,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if '["median"]' in block]
  lines = [line for line in example.splitlines() if line]
  assert len(lines) == 10, lines
  config = small("hybrid")
  config.objective.update(advantage="median", reward="root")
  with pytest.raises(ConfigError) as caught:
    experiment.parse(config)
  for line in ("unknown name 'median'; known: none, mean, leave_one_out", "unknown name 'root'; known: log_prob, info"):
    assert any(line in fault for fault in caught.value.faults)
  with mock.patch.dict(ADVANTAGES), mock.patch.dict(REWARDS):
    exec(example, {})
    trains(config)


def trains(config):
  """One step does something."""
  built = experiment.build(experiment.parse(config))
  optimizer = optax.sgd(1.0)
  step = jax.jit(make_train_step(built.loss_fn, optimizer, lambda count: 0.1, StepConfig()))
  before = make_init(built.init, optimizer, ema=False)(jax.random.key(0))
  batch = jax.tree.map(jnp.asarray, next(built.data.batches("train", global_batch=2)))
  after, metrics = step(before, batch, jax.random.key(1))
  assert int(after.step) == 1 and float(metrics["skipped"]) == 0 and float(metrics["grad_norm"]) > 0
  assert 0 < float(metrics["reward"]) < 1 and float(metrics["reward_std"]) > 0, "a root, no logarithm"
  assert np.abs(flat(after.params) - flat(before.params)).max() > 0
