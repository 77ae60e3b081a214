import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from tests.evaluation.harness import KEY, THOUGHT, make, run
from tests.slow import leaving
from thinking_lm.errors import ConfigError
from thinking_lm.evaluation import draws as draws_lib
from thinking_lm.evaluation import evaluators
from thinking_lm.evaluation.controls import CONTROLS, Source
from thinking_lm.objectives import objective
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Batch

LATENT = dict(kind="latent", length=1)
STREAM = dict(kind="sampled", length=2, placement="stride", stride=2)
KINDS = dict(latent=LATENT, sampled=THOUGHT, stream=STREAM)


@functools.cache
def traces(kind, **changes):
  """key -> Trace of all validation rows at once, as the model itself thinks."""
  subject, params, _ = make(thought=KINDS[kind])
  batch = next(subject.data.evaluation_batches("validation", batch_size=13))
  thought = dataclasses.replace(subject.config.thought, samples=1, **changes)
  return jax.jit(lambda key: subject.rollout(params, batch, key, thought=thought))


def same(left, right, rtol=0.0, atol=0.0):
  """Two evaluations have the same sums of every row."""
  assert left.arms.keys() == right.arms.keys() and left.draws.keys() == right.draws.keys()
  np.testing.assert_array_equal(left.ids_R, right.ids_R)
  for name, arm in left.arms.items():
    other = right.arms[name]
    for one, two in zip((*arm.sums, *arm.reference), (*other.sums, *other.reference), strict=True):
      np.testing.assert_allclose(one, two, rtol=rtol, atol=atol)
    assert arm.changed == other.changed
  for k, draws in left.draws.items():
    for one, two in zip(draws, right.draws[k], strict=True):
      np.testing.assert_allclose(one, two, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("kind", "samples"), leaving([("sampled", (1, 2)), ("stream", ())], [("stream", ())]))
def test_batch_size_changes_nothing_and_a_repetition_not_a_bit(kind, samples):
  made = make(thought=KINDS[kind])
  options = dict(samples=samples, controls=["shuffled"])
  found = run(made, **options)
  same(found, run(made, **options))
  same(found, run(made, **options, batch_size=8), rtol=1e-5, atol=1e-5)
  assert len(found.ids_R) == 13 and found.real_tokens == 13 * 6
  assert found.think_tokens == found.anchors * made[0].config.thought.length


@pytest.mark.parametrize("kind", leaving(KINDS, ["latent"]))
def test_own_and_none_are_what_the_rollout_says(kind):
  made = make(thought=KINDS[kind])
  found = run(made, controls=["none"])
  own, plain = traces(kind)(jax.random.fold_in(KEY, 0)), traces(kind, length=0)(KEY)
  for name, trace in dict(own=own, none=plain).items():
    sums = found.arms[name].sums
    np.testing.assert_allclose(sums.nats_R, -trace.logp_BGT[:, 0].sum(axis=1), rtol=2e-5)
    np.testing.assert_array_equal(sums.hits_R, trace.hit_BGT[:, 0].sum(axis=1))
    np.testing.assert_array_equal(sums.whole_R, trace.hit_BGT[:, 0].all(axis=1))
    assert (sums.count_R == 6).all() and (sums.bytes_R == 6).all() and (sums.labels_R == 6).all()
  np.testing.assert_array_equal(found.arms["none"].reference.nats_R, found.arms["own"].sums.nats_R)
  assert not np.allclose(found.arms["none"].sums.nats_R, found.arms["own"].sums.nats_R, rtol=1e-3)


def test_thoughts_without_room_are_counted():
  subject, params, _ = made = make(thought=LATENT | dict(room=4))
  found = run(made, controls=["none"])
  assert (found.anchors, found.dropped, found.think_tokens) == (13 * 4, 13 * 2, 13 * 4)
  batch = next(subject.data.batches("train", global_batch=8))
  told = objective.describe(jax.jit(subject.rollout)(params, batch, KEY))["thoughts_dropped"]
  assert (float(told.total), float(told.count)) == (16, 8)
  assert "thoughts_dropped" not in objective.describe(traces("latent")(KEY))


@pytest.mark.parametrize("topology", ["private", "persistent"])
def test_every_control_puts_other_thoughts_in_and_counts_what_it_changed(topology):
  made = make(thought=LATENT | dict(topology=topology))
  found = run(made)
  assert list(found.arms) == ["own", "none", "pause", "shuffled", "moved"] and list(found.omitted) == ["draws"]
  changed = {name: arm.changed for name, arm in found.arms.items()}
  assert changed == dict(own=78, none=0, pause=78, shuffled=72, moved=65)
  counts = {name: arm.sums.count_R.tolist() for name, arm in found.arms.items()}
  assert counts["pause"] == [6] * 13 and counts["shuffled"] == [0] + [6] * 12 and counts["moved"] == [5] * 13
  assert found.arms["moved"].labels_T.tolist() == [0] + [13] * 5
  for name, arm in list(found.arms.items())[1:]:
    np.testing.assert_array_equal(arm.reference.count_R, arm.sums.count_R)
    kept = arm.sums.count_R > 0
    assert (np.abs(arm.sums.nats_R - arm.reference.nats_R)[kept] > 1e-3).all(), name


@pytest.mark.parametrize(
  ("topology", "rescore"), leaving([("private", True), ("persistent", False)], [("private", True)])
)
def test_pause_lasts_as_long_as_the_thought_in_whose_place_it_stands(topology, rescore):
  thought = dict(kind="sampled", length=3, halting="stop", topology=topology, rescore=rescore, samples=2)
  subject, params, runner = make(thought=thought, objective=dict(score_weight=1.0))
  batch = next(subject.data.evaluation_batches("validation", batch_size=13))
  own = jax.jit(functools.partial(subject.rollout, thought=runner.thought))(params, batch, KEY)
  turned, changed_BN = CONTROLS["pause"](Source(own.thoughts, own.valid_BN, params["embedding"][0], None, None))
  score = lambda given: subject.rollout(params, batch, KEY, given=given, thought=runner.thought)
  paused = jax.jit(score)(turned)
  assert changed_BN.all() and len(np.unique(own.used_BGN)) > 1
  np.testing.assert_array_equal(paused.used_BGN, own.used_BGN)


def test_pause_in_place_of_pause_is_no_change_at_all():
  made = make(thought=dict(kind="pause", length=2))
  assert list(run(made).arms) == ["own", "none"]
  arm = run(made, controls=["pause"]).arms["pause"]
  np.testing.assert_array_equal(arm.sums.nats_R, arm.reference.nats_R)
  assert arm.changed == 78


@pytest.mark.parametrize(("kind", "at_once"), [("sampled", 2), ("sampled", 8), ("stream", 2)])
def test_draws_are_nested_and_mixed_as_defined(kind, at_once, monkeypatch):
  monkeypatch.setattr(draws_lib, "AT_ONCE", at_once)
  made = make(thought=KINDS[kind])
  found = run(made, controls=[], samples=(5, 1, 3))
  trace = traces(kind)
  logp_KBT = np.array([trace(jax.random.fold_in(KEY, k)).logp_BGT[:, 0] for k in range(5)], np.float64)
  assert list(found.draws) == [1, 3, 5]
  for K, draws in found.draws.items():
    p_KBX = np.exp(logp_KBT[:K] if kind == "sampled" else logp_KBT[:K].sum(axis=2, keepdims=True))
    np.testing.assert_allclose(draws.marginal_R, -np.log(p_KBX.mean(axis=0)).sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(draws.expected_R, -logp_KBT[:K].mean(axis=0).sum(axis=1), rtol=1e-5)
    assert (draws.marginal_R <= draws.expected_R + 1e-9).all()
  np.testing.assert_allclose(found.draws[1].marginal_R, found.arms["own"].sums.nats_R, rtol=1e-5)
  assert (found.draws[5].marginal_R < found.draws[5].expected_R - 1e-4).any()


def test_what_draws_nothing_has_no_draws():
  assert not run(make(thought=LATENT), controls=[], samples=(1, 8)).draws
  changes = [{}, dict(temperature=0.0), dict(length=0), dict(kind="gumbel"), dict(kind="soft"), dict(kind="pause")]
  drawn = [evaluators.draws_anything(ThoughtConfig(**THOUGHT | change)) for change in changes]
  assert drawn == [True, False, False, True, False, False]


def test_one_row_cannot_be_shuffled_and_one_anchor_cannot_be_moved():
  made = make(thought=LATENT | dict(placement="explicit", positions=(2,)))
  found = run(made, limit=1)
  assert list(found.arms) == ["own", "none", "pause"]
  assert found.omitted == dict.fromkeys(("shuffled", "moved"), "no thought has a donor") | dict(
    draws="thoughts of kind 'latent' draw nothing: all samples are equal"
  )
  assert len(found.ids_R) == 1 and list(run(made, limit=2).arms)[3:] == ["shuffled"]


def test_without_thoughts_there_is_only_none():
  made = make(thought=dict(length=0))
  found = run(made)
  assert list(found.arms) == ["none"] and found.reference == "none" and found.think_tokens == 0
  with pytest.raises(ConfigError, match=r"control 'pause' needs thoughts.*possible: none"):
    run(made, controls=["pause"])


def test_wrong_requests_are_named():
  made = make(thought=LATENT)
  with pytest.raises(ConfigError, match=r"unknown control 'mvoed'; known: moved, none, own, pause, shuffled"):
    run(made, controls=["mvoed"])
  with pytest.raises(ConfigError, match=r"samples must be 1 or more, got \(0,\)"):
    run(made, samples=(0,))
  with pytest.raises(ConfigError, match="unknown split 'dev'; known: test, train, validation"):
    evaluators.evaluate(*made[:2], "dev", key=KEY, batch_size=2)


@pytest.mark.parametrize("weigh_prompt", [False, True])
def test_a_text_task_is_asked_for_its_answer_only(weigh_prompt):
  task = dict(name="last_letter", length=2, weigh_prompt=weigh_prompt)
  made = make(task=task, thought=LATENT | dict(placement="stride", stride=4))
  found = run(made, controls=[])
  sums = found.arms["own"].sums
  examples = made[0].data.examples("validation", 13)
  assert sums.labels_R.tolist() == [len(example.answer) + 1 for example in examples]
  assert sums.count_R.tolist() == [example.weights.sum() for example in examples]
  assert (sums.count_R > sums.labels_R).all() == weigh_prompt


def test_generated_answers_are_scored_by_the_task():
  made = make(task=dict(name="last_letter", length=2), thought=dict(length=0))
  seen = []

  def answer(examples):
    seen.append(len(examples))
    return [example.answer if example.prompt[0] < ord("m") else b"no" for example in examples]

  found = run(made, answer=answer, limit=10)
  wanted = [float(example.prompt[0] < ord("m")) for example in made[0].data.examples("validation", 10)]
  assert found.generated.tolist() == wanted and seen == [4, 4, 2] and 0 < sum(wanted) < 10
  text = make(data=dict(source="default", sequence_length=8), thought=dict(length=0))
  with pytest.raises(ConfigError, match="no task"):
    run(text, answer=answer, limit=1)


def test_packed_text_counts_every_token_and_every_byte_once():
  made = make(data=dict(source="default", sequence_length=32), thought=STREAM | dict(stride=5))
  found = run(made, limit=6, controls=["shuffled"])
  own = found.arms["own"].sums
  assert own.count_R.tolist() == [32] * 6 and found.real_tokens == 192
  batch = next(made[0].data.evaluation_batches("validation", batch_size=6))
  assert own.bytes_R.tolist() == (batch.targets_BT != made[0].data.vocabulary.document).sum(axis=1).tolist()
  assert 0 < own.nats_R.sum() / own.bytes_R.sum() / math.log(2) < 12
  assert found.arms["shuffled"].sums.count_R[0] == 4  # the targets before the first thought: nothing reaches them


def test_positions_add_up_to_the_labels():
  arm = run(make(thought=LATENT), controls=["shuffled"]).arms["shuffled"]
  assert arm.labels_T.tolist() == [12] * 6 and arm.hits_T.sum() == arm.sums.hits_R.sum() > 0


def test_each_function_is_compiled_once():
  made, progress = make(thought=LATENT), []
  run(made, progress=lambda *of: progress.append(of))
  runner = made[2]
  functions = [runner.think, runner.score, runner.without, *runner.turn.values()]
  assert [function._cache_size() for function in functions] == [1] * 7
  assert progress == [(4, 13), (8, 13), (12, 13), (13, 13)]


def test_sums_of_a_row_by_hand():
  vocabulary = make(thought=LATENT)[0].data.vocabulary  # six symbols of one byte, and the border, of none
  targets_BT = np.array([[0, 6, 1, 2]])
  weights_BT = np.array([[1.0, 1.0, 2.0, 0.0]])
  batch = Batch(None, targets_BT, weights_BT, None, None, None)
  logp_BT = np.array([[-1.0, -2.0, -4.0, np.nan]])
  hit_BT = np.array([[True, False, True, True]])
  every = np.ones((1, 4), bool)
  found = evaluators.row_sums(batch, vocabulary, every, every, logp_BT, hit_BT)
  assert [a.tolist() for a in found] == [[11.0], [4.0], [3.0], [2.0], [3.0], [0.0]]
  counted_BT = np.array([[True, False, True, True]])
  found = evaluators.row_sums(batch, vocabulary, counted_BT, every, logp_BT, hit_BT)
  assert [a.tolist() for a in found] == [[9.0], [3.0], [3.0], [2.0], [2.0], [1.0]]
