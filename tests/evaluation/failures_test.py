"""Policies that fail, each in its own way: what a run would log of them raises the alarms, and of a sound one none.

One tiny model, its parameters turned so that its thoughts go wrong. Nothing is trained here: a row of a run is made of
what the loss tells and what the examination finds.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.evaluation import harness
from thinking_lm import experiment
from thinking_lm.metrics import values
from thinking_lm.objectives.health import HealthConfig, History, rules, signs
from thinking_lm.training.alarms import Watch
from thinking_lm.training.state import TrainState
from thinking_lm.types import Carried

STOP, PAUSE = 8, 9
"""Rows of the embedding table, behind seven real tokens and START."""


class World:
  """An experiment whose score term is weighed against targets without thoughts, and its compiled parts."""

  def __init__(self):
    config = harness.config(
      thought=dict(kind="sampled", length=6, halting="stop", topology="private", samples=2),
      objective=dict(nll_weight=0.0, base_weight=1.0, score_weight=1.0, kl_weight=0.1),
      health=dict(every=1, patience=1),
    )
    self.built = experiment.build(experiment.parse(config))
    (self.look,) = self.built._examinations(harness.hand)
    batch = next(iter(self.built.data.evaluation_batches("validation", batch_size=8)))
    self.batch = jax.tree.map(jnp.asarray, batch)
    self.told = jax.jit(self._told)

  def _told(self, params, older, reference):
    """What a step tells of thoughts that `older` parameters drew."""
    carried = Carried(step=jnp.int32(0), extra=dict(reference=reference))
    drawn = self.built.draw(older, self.batch, harness.KEY, carried)
    return self.built.loss_fn(params, self.batch, harness.KEY, carried.replace(drawn=drawn))[1]

  def row(self, params, older) -> dict[str, float]:
    """All that a run would log."""
    reference = turned(sound(), moved(0.05, seed=1))
    state = TrainState(jnp.int32(0), jax.tree.map(jnp.asarray, params), None, None, None, dict(reference=reference))
    return values(self.told(params, older, reference)) | self.look(0, state)


@functools.cache
def world() -> World:
  return World()


@functools.cache
def sound():
  """Parameters of a policy that stops now and then, repeats itself little, and draws neither one token nor all."""
  params = jax.tree.map(np.array, jax.jit(world().built.init)(jax.random.key(22)))
  params["embedding"][:, 0] = 0.5  # so that this part of a hidden state is positive, whatever was read ...
  params["layers"]["out"][..., 0] = params["layers"]["down"][..., 0] = 0
  params["embedding"][STOP, 0] = 1.7  # ... and a row likelier everywhere the larger it is there
  params["layers"]["out"] *= 3
  params["final_norm"]["scale"] *= 1.3
  return params


@functools.cache
def sound_row() -> dict[str, float]:
  return world().row(sound(), turned(sound(), moved(0.02, seed=2)))


def turned(params, *changes):
  """A copy, changed."""
  params = jax.tree.map(np.array, params)
  for change in changes:
    change(params)
  return params


def sharper(by):
  """All logits, so many times."""

  def change(params):
    params["final_norm"]["scale"] *= by

  return change


def likelier(row, by):
  def change(params):
    params["embedding"][row, 0] += by

  return change


def moved(by, seed):
  """Every parameter, by noise of so many times its mean size."""

  def change(params):
    rng = np.random.default_rng(seed)
    for leaf in jax.tree.leaves(params):
      leaf += (by * np.abs(leaf).mean() * rng.normal(size=leaf.shape)).astype(leaf.dtype)

  return change


def deaf(params):
  """Nothing that was thought is read: a prediction after STOP is always the same."""
  for name in ("out", "down"):
    params["layers"][name] *= 0


def alarms(*rows) -> set[str]:
  """What a run raises that is sound for some time and then has these rows."""
  watch = world().built._watch()
  said = {name for row in [sound_row()] * 11 for name in watch(0, row)}
  assert not said, said
  return {name.removeprefix("alarm_") for row in rows for name in watch(0, row)}


POLICIES = dict(
  sure=([sharper(100)], {"entropy_low", "entropy_place"}),
  noise=([sharper(0.01)], {"entropy_high", "entropy_uniform"}),
  endless=([likelier(STOP, -20)], {"full"}),
  silent=([likelier(STOP, 20)], {"empty", "distinct", "rank"}),
  stuck=([likelier(3, 20)], {"repeated", "looped", "distinct", "rank"}),
  # one token, then STOP: what is behind is not thought
  stammering=([likelier(3, 20), likelier(STOP, 18.8)], {"rank", "lengthy"}),
  deaf=([deaf], {"flat", "gradients", "content"}),
  fooled=([deaf, sharper(0)], {"effect"}),
  moved=([moved(1.0, seed=3)], {"drift"}),
)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_that_fails_raises_its_alarms(name):
  changes, expected = POLICIES[name]
  params = turned(sound(), *changes)
  row = world().row(params, params)
  raised = alarms(row)
  assert expected <= raised, (raised, row)
  assert not raised & {"mismatch", "leap", "clipped"}, "drawn and scored by the same parameters"


def test_a_policy_that_leaves_the_one_that_drew_raises_its_alarms():
  raised = alarms(world().row(turned(sound(), moved(1.0, seed=3)), sound()))
  assert {"drift", "leap", "clipped"} <= raised and not raised & {"full", "empty", "distinct", "flat"}, raised


def test_a_thought_of_pauses_is_what_it_would_be_without_content():
  """A row of pauses that says what is thought anyway takes nothing away."""
  stuck = turned(sound(), likelier(3, 20))
  told = turned(stuck)
  told["embedding"][PAUSE] = told["embedding"][3]
  assert abs(world().row(stuck, stuck)["effect_pause"]) > 0.1
  assert world().row(told, told)["effect_pause"] == pytest.approx(0, abs=1e-4)


def test_a_policy_whose_thoughts_are_not_read_has_a_gradient_of_noise():
  silent = turned(sound(), deaf)
  rule = rules(HealthConfig(snr=0.1), 7, False)["snr"]
  broken = lambda row: rule.broken(rule.measure(dict(score_grad_snr=History(0.0, (row["score_grad_snr"],)))))
  assert broken(world().row(silent, silent)) and not broken(sound_row())


@pytest.mark.parametrize("changes,expected", [([], 6), (POLICIES["silent"][0], 0)], ids=["sound", "silent"])
def test_ninety_five_percent_of_thoughts_are_no_longer(changes, expected):
  params = turned(sound(), *changes)
  assert world().row(params, params)["think_length_p95"] == expected


def test_a_cell_that_hands_on_what_it_got_stands_still():
  subject, params, _ = harness.make(thought=dict(kind="latent", length=2, topology="private"))
  told = jax.jit(lambda params: signs(subject.rollout(params, world().batch, harness.KEY), subject.config.thought))
  watch = Watch(rules(HealthConfig(), 7, False, tokens=False), History, patience=1)
  assert watch(0, values(told(params))) == {}
  assert watch(1, values(told(turned(params, deaf)))) == dict(alarm_alike=1.0)


def test_thoughts_out_of_the_scale_of_embeddings_raise_an_alarm():
  """A linear map of the state to the next input, as it starts and with entries ten times as large."""
  subject, params, _ = harness.make(
    thought=dict(kind="latent", length=2, topology="private"), model=dict(latent_map="linear")
  )
  told = jax.jit(lambda params: signs(subject.rollout(params, world().batch, harness.KEY), subject.config.thought))
  watch = Watch(rules(HealthConfig(), 7, False, tokens=False), History, patience=1)
  assert watch(0, values(told(params))) == {}
  loud = turned(params)
  loud["latent"] *= 10
  assert watch(1, values(told(loud))) == dict(alarm_scale=1.0)


def test_noise_is_not_judged_as_tokens_are():
  """A sound run of a kind whose density has the entropy of its noise, -28 nats here, whatever it thinks."""
  subject, params, _ = harness.make(
    thought=dict(kind="noisy", noise=0.1, length=2, topology="private", samples=2),
    objective=dict(score_weight=1.0),
    health=dict(entropy_stop=0.05, patience=1),
  )
  told = jax.jit(lambda params: subject.loss_fn(params, world().batch, harness.KEY, Carried(step=jnp.int32(0)))[1])
  row = values(told(params))
  assert row["think_entropy"] < 0 and subject._watch()(0, row) == {}


@pytest.mark.parametrize("by,alarm", [(20, "empty"), (-20, "full"), (0, None)])
def test_a_head_that_ends_all_thoughts_or_none_raises_its_alarm(by, alarm):
  subject, params, _ = harness.make(thought=dict(kind="latent", length=3, topology="private", halting="ponder"))
  told = jax.jit(lambda params: signs(subject.rollout(params, world().batch, harness.KEY), subject.config.thought))
  params = turned(params)
  params["heads"]["halt"]["bias"] += by
  watch = Watch(rules(HealthConfig(), 7, False, tokens=False), History, patience=1)
  raised = watch(0, {name: float(sign) for name, sign in told(params).items()})
  assert raised.keys() & {"alarm_empty", "alarm_full"} == ({f"alarm_{alarm}"} if alarm else set())


@pytest.mark.parametrize(
  "weights,terms",
  [
    (dict(score_weight=1.0), {"nll", "score"}),
    (dict(score_weight=1.0, nll_weight=0.0, base_weight=0.0), {"score"}),
    (dict(score_weight=0.0), set()),
  ],
)
def test_the_policys_gradient_is_looked_at_wherever_there_is_one(weights, terms):
  config = harness.config(
    thought=dict(kind="sampled", length=2, topology="private", samples=2), objective=weights, health=dict(every=200)
  )  # a run of two steps: it is examined after the last one
  (look,) = experiment.build(experiment.parse(config))._examinations(None)
  assert set(look._terms) == terms
