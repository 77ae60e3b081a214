import dataclasses

import jax
import pytest

from tests.evaluation.harness import KEY, THOUGHT, config, hand, make, run, train
from thinking_lm import experiment
from thinking_lm.errors import ConfigError
from thinking_lm.evaluation.hook import EvaluationConfig, Monitor, hooks
from thinking_lm.training import state


def test_training_does_not_notice_the_hook(trained, tmp_path):
  _, plain, plain_rows = trained
  watched, rows = train(tmp_path / "watched", every=2)
  assert state.digest(watched) == state.digest(plain)
  found = [row for row in rows if "validation_nll" in row]
  assert [row["step"] for row in found] == [2, 3] and not any("validation_nll" in row for row in plain_rows)
  assert {name for name in found[0] if name.startswith("validation")} == {
    f"validation_{name}" for name in ("nll", "nll_none", "accuracy", "accuracy_none", "bits_per_byte")
  }
  losses = [[row["loss"] for row in some if "loss" in row] for some in (rows, plain_rows)]
  assert losses[0] == losses[1] and len(losses[0]) == 3


def test_the_numbers_are_those_of_an_evaluation():
  subject, params, _ = made = make(thought=THOUGHT)
  monitor = Monitor(EvaluationConfig(every=5, limit=0, batch_size=4), subject, jax.random.fold_in(KEY, 0), hand)
  assert monitor.every == 5
  found = monitor(1, dataclasses.make_dataclass("State", ["params"])(params))
  arms = run(made, controls=["none"]).arms
  for tail, sums in {"": arms["own"].sums, "_none": arms["none"].sums}.items():
    assert found[f"validation_nll{tail}"] == pytest.approx(sums.nats_R.sum() / 78, rel=1e-5)
    assert found[f"validation_accuracy{tail}"] == pytest.approx(sums.hits_R.sum() / 78, rel=1e-6)
  assert found["validation_bits_per_byte"] == pytest.approx(found["validation_nll"] / 0.6931471805599453, rel=1e-6)


def test_without_thoughts_there_is_one_number_of_each():
  subject, params, _ = make(thought=dict(length=0))
  monitor = Monitor(EvaluationConfig(every=1, limit=4), subject, KEY, hand)
  found = monitor(1, dataclasses.make_dataclass("State", ["params"])(params))
  assert set(found) == {"validation_nll_none", "validation_accuracy_none", "validation_bits_per_byte"}


def test_an_empty_split_is_refused_before_training(tmp_path):
  (tmp_path / "text.txt").write_text("some text " * 20)
  data = dict(source="text", input=str(tmp_path / "text.txt"), sequence_length=8, test_fraction=0.0)
  subject = experiment.build(experiment.parse(config(data=data)))
  with pytest.raises(ConfigError, match=r"evaluation\.split=test has no rows"):
    hooks(EvaluationConfig(every=1, split="test"), subject, KEY, hand)
  assert hooks(EvaluationConfig(every=0, split="test"), subject, KEY, hand) == ()
