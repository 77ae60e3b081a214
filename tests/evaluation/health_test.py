"""The examination of thoughts against the plain way to find its numbers, and on models that show the failures."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.evaluation import harness
from tests.slow import leaving
from thinking_lm import experiment
from thinking_lm.errors import DivergedError
from thinking_lm.evaluation.health import Examination, effective_rank, norm_and_snr, of_half, percentile
from thinking_lm.objectives import carry
from thinking_lm.objectives.health import HealthConfig, History, rules
from thinking_lm.training import loop
from thinking_lm.training.state import TrainState
from thinking_lm.training.writers import read_rows
from thinking_lm.types import Carried

SCORED = dict(score_weight=1.0)
TWO = dict(kind="sampled", length=2, topology="persistent", samples=2, lookahead=0)


def examine(subject, params):
  """The numbers of one look."""
  state = TrainState(0, params, None, None, None, {})
  return Examination(1, "validation", 8, subject, harness.KEY, harness.hand, {})(0, state)


@pytest.mark.parametrize("topology", leaving(["private", "persistent"], ["private"]))
def test_effects_are_differences_of_nats(topology):
  subject, params, _ = harness.make(thought=TWO | dict(topology=topology, lookahead=int(topology == "private")))
  found = examine(subject, params)
  batch = next(iter(subject.data.evaluation_batches("validation", batch_size=8)))
  batch = jax.tree.map(jnp.asarray, batch)
  thought = dataclasses.replace(subject.config.thought, samples=1)

  def nats(length):
    trace = jax.jit(subject.rollout, static_argnames="thought")(
      params, batch, harness.KEY, thought=dataclasses.replace(thought, length=length)
    )
    return -np.average(np.asarray(trace.logp_BGT)[:, 0], weights=batch.weights_BT)

  assert found["effect_none"] == pytest.approx(nats(0) - nats(2), abs=1e-5)
  assert found["effect_shuffled"] != 0
  assert 0 <= found["sampler_mismatch_mean"] <= found["sampler_mismatch"] < 1e-4
  assert found["sampler_ratio"] == pytest.approx(1, abs=1e-4)
  own = jax.jit(subject.rollout, static_argnames="thought")(params, batch, harness.KEY, thought=thought)
  logp_NJ = np.asarray(own.token_logp_BGNJ)[np.asarray(own.chosen_BGNJ)].reshape(-1, 2)  # every thought has both tokens
  assert found["think_entropy_lowest"] == pytest.approx(-logp_NJ.mean(axis=0).max(), rel=1e-5)


def test_a_model_that_ignores_its_thoughts_shows_no_effect():
  subject, params, _ = harness.make(thought=dict(kind="latent", length=1, topology="private"), model=dict(layers=1))
  params = jax.tree.map(jnp.copy, params)
  params["layers"]["out"] *= 0.0
  params["layers"]["down"] *= 0.0
  params["embedding"] *= 0.0  # every input, and every thought of it, is the same
  found = examine(subject, params)
  assert found["effect_none"] == pytest.approx(0, abs=1e-6)
  assert found["effect_shuffled"] == pytest.approx(0, abs=1e-6)
  assert found["effect_pause"] == pytest.approx(0, abs=1e-6)
  assert found["thought_rank"] == 0


def test_gradients_that_vanish_or_explode_from_think_token_to_think_token_raise_an_alarm():
  subject, params, _ = harness.make(thought=dict(kind="latent", length=16, topology="private"))
  look = Examination(1, "validation", 8, subject, harness.KEY, harness.hand, {})
  rule = rules(HealthConfig(chain=50.0), 7, False)["chain"]

  def ratio(**scales):
    changed = jax.tree.map(jnp.copy, params)
    for name, scale in scales.items():
      part = changed["final_norm"] if name == "scale" else changed["layers"]
      part[name] *= scale
    found = look(0, TrainState(0, changed, None, None, None, {}))
    histories = {name: History(found[name], (found[name],)) for name in rule.reads}
    return found["chain_grad_first"] / found["chain_grad_last"], rule.broken(rule.measure(histories))

  sound = ratio()
  faint = ratio(scale=1e-6, out=0.0)  # a state that is next to nothing, and that no later one sees
  loud = ratio(query=30.0, key=30.0)  # which token is looked at turns on the smallest difference
  assert not sound[1], sound
  assert faint[0] < 1e-3 and faint[1], faint
  assert loud[0] > 50 and loud[1], loud


def test_a_chain_of_one_token_thoughts_runs_along_the_row():
  subject, params, _ = harness.make(thought=dict(kind="latent", length=1), task=dict(length=3))
  found = examine(subject, params)
  batch = jax.tree.map(jnp.asarray, next(iter(subject.data.evaluation_batches("validation", batch_size=8))))
  nats = lambda taps: -(subject.rollout(params, batch, harness.KEY, taps=taps).logp_BGT[:, 0] * batch.weights_BT).sum()
  grads = jax.jit(jax.grad(nats))(jnp.zeros((8, 1, 3, 1, 16))) / batch.weights_BT.sum()
  norms = np.sqrt(np.square(grads).sum(axis=(0, 1, 3, 4)))
  np.testing.assert_allclose([found["chain_grad_first"], found["chain_grad_last"]], norms[[0, 2]], rtol=1e-4)
  assert abs(norms[0] / norms[2] - 1) > 0.02
  still = dict(length=1, topology="private")
  assert "chain_grad_first" not in examine(*harness.make(thought=dict(kind="latent") | still, task=dict(length=3))[:2])


@pytest.mark.parametrize("topology", ["private", "persistent"])
def test_rotary_positions_that_differ_between_sampler_and_learner_are_a_mismatch(topology):
  subject, params, _ = harness.make(thought=TWO | dict(topology=topology, lookahead=int(topology == "private")))
  params = jax.tree.map(jnp.copy, params)
  for name in ("query", "key"):  # positions matter
    params["layers"][name] *= 4.0

  class Apart(experiment.Experiment):
    """Draws as training does with one rule of positions, and scores with another."""

    def rollout(self, params, batch, key, given=None, thought=None):
      drawing = given is None and thought.rescore == (topology == "private")
      return super().rollout(
        params, batch, key, given, dataclasses.replace(thought, rotary="advance" if drawing else "anchor")
      )

  found = examine(Apart(subject.config, subject.data, subject.model), params)
  assert found["sampler_mismatch"] > 1e-3
  assert found["sampler_mismatch"] > found["sampler_mismatch_mean"] > 1e-4
  alarms = rules(HealthConfig(), 7, half_precision=False)
  assert alarms["mismatch"].broken(found["sampler_mismatch"]) and alarms["ratio"].broken(found["sampler_ratio"]), found
  sound = examine(subject, params)
  assert not any(alarms[name].broken(sound[f"sampler_{name}"]) for name in ("mismatch", "ratio")), sound


@pytest.mark.parametrize("thought", [TWO, dict(kind="noisy", length=1, topology="private", samples=2)])
def test_how_far_the_policy_is_from_the_first_one_is_told(thought):
  """By hand: the first parameters' thoughts, under them and under others."""
  subject, first, _ = harness.make(thought=thought, objective=SCORED)
  moved = jax.tree.map(lambda leaf: 0.9 * leaf, first)
  calls = []
  look = Examination(
    1, "validation", 8, subject, harness.KEY, harness.hand, {}, lambda params: calls.append(params) or first
  )
  look._look = lambda params, batch: {}
  found = [look(0, TrainState(0, params, None, None, None, {})) for params in (first, moved)]
  assert len(calls) == 1 and set(found[0]) == {"kl_start_k1", "kl_start_k3"}
  np.testing.assert_allclose(list(found[0].values()), 0, atol=1e-5)
  one = dataclasses.replace(subject.config.thought, samples=1)
  batch, roll = look._rows(), jax.jit(subject.rollout, static_argnames="thought")
  own = roll(first, batch, harness.KEY, thought=one)
  drawn = own.thoughts
  if thought is TWO:
    drawn = drawn.replace(inputs_BGNJD=subject.model.bind(moved).embed(drawn.tokens_BGNJ))
  other = roll(moved, batch, harness.KEY, given=drawn, thought=one)
  away_J = np.asarray(own.token_logp_BGNJ - other.token_logp_BGNJ)[np.asarray(own.chosen_BGNJ)]
  count = np.asarray(own.valid_BN).sum()
  assert found[1]["kl_start_k1"] == pytest.approx(away_J.sum() / count, rel=1e-4)
  assert found[1]["kl_start_k3"] == pytest.approx((np.exp(-away_J) - 1 + away_J).sum() / count, rel=1e-4)
  assert found[1]["kl_start_k3"] > 1e-3


def test_signal_to_noise_is_that_of_the_mean_gradient():
  """Many batches of eight rows, whose gradients are a true one and noise."""
  rng, true, std = np.random.default_rng(0), np.array([1.0, -2.0, 0.5]), 3.0
  rows = (true + std * rng.normal(size=(4000, 8, 3))).astype(np.float32)
  halves = [(jnp.asarray(rows[:, half::2].sum(axis=1)), jnp.full(4000, 4.0)) for half in (0, 1)]
  signal, noise = (true**2).sum(), 3 * std**2 / 8
  a, b = (sums / counts[:, None] for sums, counts in halves)
  np.testing.assert_allclose(np.mean((a * b).sum(axis=1)), signal, rtol=0.05)
  np.testing.assert_allclose(np.mean(((a - b) ** 2).sum(axis=1)) / 4, noise, rtol=0.05)
  found = jax.vmap(norm_and_snr)(*halves)
  np.testing.assert_allclose(found["norm"], np.linalg.norm(rows.mean(axis=1), axis=1), rtol=1e-5)
  np.testing.assert_allclose(found["snr"], (a * b).sum(axis=1) / (((a - b) ** 2).sum(axis=1) / 4), rtol=1e-4)


@pytest.mark.parametrize(
  "thought,objective",
  leaving(
    cases := [
      (dict(), dict()),
      (dict(halting="stop"), SCORED | dict(price=0.5)),
      (dict(), SCORED | dict(advantage="none", reward="prob")),
      (dict(), SCORED | dict(advantage="ema")),
      (dict(kind="latent", samples=1, halting="ponder"), dict(price=0.1, halt_weight=0.1)),
    ],
    [cases[3], cases[4]],
  ),
)
def test_the_halves_of_a_batch_are_the_batch(thought, objective):
  thought = TWO | dict(topology="private", lookahead=1) | thought
  subject, params, _ = harness.make(thought=thought, objective=objective)
  batch = jax.tree.map(jnp.asarray, next(iter(subject.data.evaluation_batches("validation", batch_size=5))))
  extra = dict(reward_mean=dict(total=jnp.float32(-0.9), weight=jnp.float32(0.5)))
  carried = Carried(step=0, extra=carry.init(subject.config.objective, params) | extra)
  whole, metrics = jax.jit(jax.grad(subject.loss_fn, has_aux=True))(params, batch, harness.KEY, carried)
  half = jax.jit(of_half(subject.loss_fn, subject.model.axes))
  (even, some), (odd, others) = (half(params, batch, harness.KEY, carried, number) for number in (0, 1))
  assert some + others == metrics["loss"].count and some > others > 0
  jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a + b, c, rtol=1e-4, atol=1e-5), even, odd, whole)


def test_a_heads_own_loss_is_no_part_of_the_score_terms_gradient():
  """Of the advantage by a value: its head learns from a loss of its own, whose gradient says nothing of the term."""
  subject, params, _ = harness.make(
    thought=TWO | dict(topology="private", lookahead=1),
    objective=SCORED | dict(advantage="value"),
    health=dict(every=1),
  )
  (look,) = subject._examinations(harness.hand)
  carried = Carried(step=0, extra=carry.init(subject.config.objective, params))
  grads, _ = look._terms["score"](params, look._rows(), harness.KEY, carried, 0)
  assert optax.tree.norm(grads["heads"]) == 0 < optax.tree.norm(grads["embedding"])


def test_an_examination_has_no_more_rows_in_memory_than_a_step():
  subject, *_ = harness.make(thought=TWO, train=dict(batch_size=8, accumulation=4), health=dict(every=1))
  (look,) = subject._examinations(harness.hand)
  assert len(look._rows().ids_B) == 2


def test_first_parameters_that_are_gone_are_said_and_not_missed(tmp_path, caplog):
  values = harness.config(
    thought=TWO | dict(topology="private", lookahead=1), train=dict(init_from=str(tmp_path / "gone"))
  )
  built = experiment.build(experiment.parse(values))
  with caplog.at_level(logging.WARNING):
    assert built._first(jax.jit(built.init)(jax.random.key(0))) is None
  assert "kl_start is not logged: " in caplog.text


def test_rank_counts_directions():
  rng = np.random.default_rng(0)
  valid_BN = np.ones((40, 50), bool)
  line = rng.normal(size=(40, 50, 1)) * np.ones(6)
  assert effective_rank(line, valid_BN) == pytest.approx(1, rel=1e-3)
  assert effective_rank(rng.normal(size=(40, 50, 6)), valid_BN) == pytest.approx(6, rel=0.05)
  line[0] = 1e3
  valid_BN[0] = False
  assert effective_rank(line, valid_BN) == pytest.approx(1, rel=1e-3)

  same = np.full((40, 50, 6), 1 / 3, np.float32)
  same[1:] *= 1 + 1e-7
  assert effective_rank(same, np.ones((40, 50), bool)) == 0


def test_a_percentile_is_of_the_valid_values():
  values_BN = np.arange(40).reshape(4, 10)
  valid_BN = values_BN % 2 == 0  # 0, 2, ... 38
  assert percentile(values_BN, valid_BN, 0.95) == 36
  assert percentile(values_BN, values_BN == 7, 0.95) == 7
  assert percentile(values_BN, values_BN < 0, 0.95) == 0


def runs(tmp_path, rate=1e-3, **health):
  """A short policy-gradient run with alarms."""
  values = harness.config(
    thought=dict(kind="sampled", length=1, topology="private", samples=2),
    objective=dict(score_weight=1.0),
    train=dict(steps=4),
    optimizer=dict(learning_rate=rate, schedule="constant", warmup_steps=0),
    health=dict(every=3, patience=1) | health,
  )
  return loop.train(experiment.build(experiment.parse(values)).run(), str(tmp_path / "run"))


def test_a_run_logs_signs_and_examinations_and_says_its_alarms(tmp_path, caplog):
  with caplog.at_level(logging.WARNING):
    runs(tmp_path, repeated=1e-6)
  rows = read_rows(tmp_path / "run/metrics.jsonl")
  assert {"distinct_thoughts", "repeated_tokens"} <= rows[0].keys()
  looks = [row for row in rows if "effect_none" in row]
  assert [row["step"] for row in looks] == [3, 4]
  wanted = {"effect_shuffled", "sampler_mismatch", "nll_grad_norm", "score_grad_norm", "thought_rank"}
  wanted |= {"kl_start_k1", "kl_start_k3", "nll_grad_snr", "score_grad_snr", "sampler_ratio", "think_entropy_lowest"}
  assert wanted <= looks[0].keys() and looks[0]["score_grad_norm"] > 0
  assert 0 < looks[0]["kl_start_k3"] < looks[1]["kl_start_k3"]
  assert rows[0]["alarm_repeated"] == 1 and "repeated at step 1" in caplog.text


def test_a_run_stops_when_entropy_collapses(tmp_path):
  with pytest.raises(DivergedError, match="entropy_stop at step"):
    runs(tmp_path, rate=1.0, entropy_stop=0.5)
