"""A frozen run says where others think; a command prints thresholds for that; a trained run thinks elsewhere."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from tests import quick
from tests.evaluation.harness import KEY, THOUGHT, config, make, train
from tests.slow import leaving
from thinking_lm import experiment
from thinking_lm.errors import ConfigError
from thinking_lm.model.need import needed
from thinking_lm.objectives.carry import init
from thinking_lm.training import loop
from thinking_lm.training.mesh import MeshConfig, global_batch, make_mesh
from thinking_lm.types import Carried


@pytest.fixture(scope="module")
def frozen(trained):
  """(Work directory, its Experiment and parameters, rows, their need by it, a need between two of these)."""
  subject, params, _ = experiment.load(str(trained[0]))
  rows = next(subject.data.evaluation_batches("validation", batch_size=13))
  need_BT = np.asarray(jax.jit(lambda p, b: needed(subject.model, p, b).need_BT)(params, rows))
  values = np.unique(need_BT)
  gap = np.argmax(np.diff(values))  # the widest, which no rounding crosses
  return str(trained[0]), subject, params, rows, need_BT, float(values[gap : gap + 2].mean())


def asking(workdir, above, **changes):
  """(Experiment, fresh parameters) of another model, which thinks where the one in `workdir` is unsure."""
  thought = dict(kind="latent", length=1, placement="entropy", room=6, need_above=above, proxy=workdir) | changes
  return make(thought=thought)[:2]


def test_a_frozen_run_says_where_another_model_thinks(frozen):
  workdir, _, _, rows, need_BT, above = frozen
  subject, params = asking(workdir, above)
  other = jax.tree.map(lambda a: a[::-1], params)
  layout = jax.jit(subject.place)(params, rows)
  for row, need_T in zip(np.asarray(layout.anchors_BN), need_BT, strict=True):
    assert row[row < 6].tolist() == np.flatnonzero(need_T > above).tolist()
  assert 0 < (need_BT > above).sum() < need_BT.size
  np.testing.assert_array_equal(jax.jit(subject.place)(other, rows).anchors_BN, layout.anchors_BN)
  own = dataclasses.replace(subject, proxy=None)
  assert not np.array_equal(jax.jit(own.place)(other, rows).anchors_BN, layout.anchors_BN)


def test_a_step_of_training_thinks_there(frozen):
  workdir, _, _, rows, need_BT, above = frozen
  subject, params = asking(workdir, above)
  carried = Carried(extra=init(subject.config.objective, params))
  _, metrics = jax.jit(subject.loss_fn)(params, rows, KEY, carried)
  assert float(metrics["thoughts"].total) == (need_BT > above).sum()


@pytest.mark.parametrize("accumulation", leaving([1, 2], [1]))
def test_copies_of_a_model_on_several_devices_think_there(frozen, accumulation):
  workdir, _, _, rows, need_BT, above = frozen
  subject, _ = asking(workdir, above)
  subject = subject.with_sections(train=dataclasses.replace(subject.config.train, accumulation=accumulation))
  few = jax.tree.map(lambda a: a[:8], rows)
  mesh = make_mesh(MeshConfig(data=8 // accumulation, tensor=accumulation))
  with jax.set_mesh(mesh):
    made = loop.program(subject.run(mesh), mesh)
    state = jax.jit(made.init, out_shardings=made.shardings)(KEY)
    _, metrics = made.step(state, global_batch(mesh, few), KEY)
  assert float(metrics["thoughts"].total) == (need_BT[:8] > above).sum()
  assert float(metrics["real_tokens"]) == (few.segments_BT > 0).sum(), "in total, not on average over parts"


def test_a_proxy_must_be_there_and_read_the_same_tokens(frozen, tmp_path):
  with pytest.raises(ConfigError, match=f"{tmp_path} is no work directory"):
    make(thought=dict(placement="entropy", room=6, proxy=str(tmp_path)))
  values = config(thought=dict(placement="entropy", room=6, proxy=frozen[0]), task=dict(group="Z2"))
  with pytest.raises(ConfigError, match="trained with another tokenizer"):
    experiment.build(experiment.parse(values))


def test_a_run_is_asked_to_think_elsewhere(frozen):
  workdir, _, _, rows, need_BT, above = frozen
  subject, params, _ = make(thought=THOUGHT)
  there = dict(placement="entropy", need_above=above, room=6, proxy=workdir, length=2, delimiters=True)
  found = subject.rethought([f"{name}={value}" for name, value in there.items()])
  assert found.config.thought == dataclasses.replace(subject.config.thought, **there)
  trace = jax.jit(found.rollout)(params, rows, KEY)
  assert trace.valid_BN.sum() == (need_BT > above).sum() and trace.thoughts.tokens_BGNJ.shape[-1] == 2
  assert subject.rethought([]) is subject
  at = subject.rethought(["placement=explicit", "positions=1+4"])
  assert np.asarray(at.place(params, rows).anchors_BN).tolist() == [[1, 4]] * 13


@pytest.mark.parametrize(
  "change,message",
  [
    ("room=many", "thought.room must be int, got 'many'"),
    ("delimiters=yes", "thought.delimiters must be true or false, got 'yes'"),
    ("positions=a", "thought.positions must be whole numbers joined by [+], got 'a'"),
    ("lenght=1", "unknown key thought.lenght; did you mean thought.length?"),
    ("placement=answer", "needs prompts and answers"),
    ("placement=entropy", "placement 'entropy' needs room"),
    ("stride=9,placement=stride", "no thought fits into rows"),
    ("halting=router,lookahead=1", "need heads that this run has not trained: router"),
    ("length=4,report=2", "one of 11 confidences .* trained with 0"),
  ],
)
def test_thoughts_that_a_run_cannot_have_are_refused(frozen, change, message):
  with pytest.raises(ConfigError, match=message):
    frozen[1].rethought(change.split(","))


def test_the_command_prints_thresholds_that_mark_the_share_it_says(frozen):
  workdir, subject, params, _, _, _ = frozen
  command = ("calibrate", f"--workdir={workdir}", "--rows=20", "--batch_size=8")
  code, out, errors = quick.command(*command, "--shares=0.5,0.1,0.04")
  assert code == 0, errors
  assert out.startswith(f"step 3 of {workdir}, 120 tokens of train\n")
  found = re.findall(r"^1 / (\d+) +([\d.]+) +(\d+)$", out, flags=re.MULTILINE)
  assert [int(share) for share, _, _ in found] == [2, 10, 25]
  rows = next(subject.data.evaluation_batches("train", batch_size=20, limit=20))
  need_BT = np.asarray(needed(subject.model, params, rows).need_BT)
  for share, above, most in found:
    marked_BT = need_BT > float(above) + 1e-4  # the threshold is one of the needs, and printed with four digits
    assert abs(marked_BT.sum() - 120 / int(share)) <= 2 and abs(marked_BT.sum(axis=1).max() - int(most)) <= 1


@pytest.mark.parametrize("shares", ["0.5,1", "half"])
def test_shares_that_are_none_are_refused(shares):
  code, _, errors = quick.command("calibrate", "--workdir=missing", f"--shares={shares}")
  assert code == 64 and f"--shares wants numbers between 0 and 1, got '{shares}'" in errors


def test_the_command_prints_ends_at_which_the_share_it_says_thinks(tmp_path):
  """Of a router's thoughts, as many use a think token at a printed thought.stop_at as the command says."""
  thought = dict(kind="latent", length=2, placement="every", topology="private", halting="router")
  train(tmp_path / "run", 0, thought, price=0.1)
  code, out, errors = quick.command("calibrate", f"--workdir={tmp_path / 'run'}", "--rows=20", "--batch_size=8")
  assert code == 0, errors
  subject, params, _ = experiment.load(str(tmp_path / "run"))
  rows = next(subject.data.evaluation_batches("train", batch_size=20, limit=20))
  table = out.partition(" thoughts of train\n")[2]
  found = re.findall(r"^1 / (\d+) +([\d.e-]+)$", table, flags=re.MULTILINE)
  assert [int(share) for share, _ in found] == [2, 4, 8, 16, 32]
  for share, stop_at in found[:3]:
    trace = jax.jit(subject.rethought([f"stop_at={stop_at}"]).rollout)(params, rows, KEY)
    thinks = (np.asarray(trace.used_BGN)[:, 0] > 0) & np.asarray(trace.valid_BN)
    assert abs(thinks.sum() - trace.valid_BN.sum() / int(share)) <= 2
