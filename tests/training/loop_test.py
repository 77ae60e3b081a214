import io
import json
import math
import os
import signal
import threading

import jax
import jax.numpy as jnp
import pytest

from tests.training import toy
from thinking_lm.errors import ConfigError, DivergedError, Preempted
from thinking_lm.training import loop, writers
from thinking_lm.training import state as state_lib
from thinking_lm.training.writers import read_rows


class Probe:
  """A hook that looks, and may do something at a step."""

  def __init__(self, every=1, at=None, do=None):
    self.every, self.at, self.do = every, at, do
    self.seen = []

  def __call__(self, step, state):
    self.seen.append((step, int(state.step)))
    if step == self.at:
      self.do()
    return dict(probe=float(step))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  """An uninterrupted run of six steps."""
  path = tmp_path_factory.mktemp("straight")
  state = loop.train(toy.make_run(), str(path))
  return path, state_lib.digest(state)


def status(path):
  record = json.loads((path / "status.json").read_text())
  return record["state"], record["step"], record["attempt"]


def losses(path):
  return [(row["step"], row["loss"]) for row in read_rows(path / "metrics.jsonl") if "loss" in row]


def test_a_run_leaves_rows_status_and_checkpoints(straight):
  path, _ = straight
  assert [step for step, _ in losses(path)] == [1, 2, 3, 4, 5, 6]
  assert losses(path)[-1][1] < losses(path)[0][1]
  assert status(path) == ("finished", 6, 1)
  row = read_rows(path / "metrics.jsonl")[-1]
  assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2), rel=1e-5)
  wanted = "grad_norm learning_rate param_norm real_tokens_per_second skipped steps_per_second update_norm wait_data"
  assert set(wanted.split()) <= row.keys()


def test_a_finished_run_is_left_as_it_is(straight, capsys):
  path, digest = straight
  before = {name: (path / name).read_bytes() for name in ("metrics.jsonl", "config.json")}
  steps = sorted(os.listdir(path / "checkpoints"))
  state = loop.train(toy.make_run(), str(path))
  assert state_lib.digest(state) == digest
  assert "already complete: 6 steps" in capsys.readouterr().out
  assert {name: (path / name).read_bytes() for name in before} == before
  assert sorted(os.listdir(path / "checkpoints")) == steps


def test_more_steps_do_not_stretch_the_schedule_of_finished_ones(tmp_path):
  path = tmp_path / "run"
  loop.train(toy.make_run(steps=4), str(path))
  before = (path / "config.json").read_bytes()
  with pytest.raises(
    ConfigError, match=r"train\.steps 8: finished steps would have .* \(step 4: .*schedule_steps=4 keeps"
  ):
    loop.train(toy.make_run(steps=8), str(path))
  assert (path / "config.json").read_bytes() == before and status(path) == ("finished", 4, 1)
  loop.train(toy.make_run(steps=6, optimizer=dict(schedule_steps=4)), str(path))
  rates = [row["learning_rate"] for row in read_rows(path / "metrics.jsonl") if "learning_rate" in row]
  assert len(rates) == 6 and rates[4] == rates[5] == pytest.approx(1e-3, rel=1e-5)


def test_a_shorter_run_than_what_is_finished_is_refused(straight):
  before = (straight[0] / "config.json").read_bytes()
  with pytest.raises(ConfigError, match=r"train.steps 4 is below the 6 steps"):
    loop.train(toy.make_run(steps=4), str(straight[0]))
  assert (straight[0] / "config.json").read_bytes() == before


def test_another_config_is_refused_before_anything_is_computed(straight):
  path, _ = straight
  with pytest.raises(ConfigError, match=r"config.optimizer.ema: 0.9 there, 0.5 now"):
    loop.train(toy.make_run(optimizer=dict(ema=0.5)), str(path))


def test_faults_of_schedule_and_rows_come_first(tmp_path):
  with pytest.raises(ConfigError, match="do not fit into"):
    loop.train(toy.make_run(optimizer=dict(warmup_steps=7)), str(tmp_path / "a"))
  assert not (tmp_path / "a").exists()
  with pytest.raises(ConfigError, match="batch_size 12 is not a multiple"):
    loop.train(toy.make_run(train=dict(batch_size=12)), str(tmp_path / "b"))


def crash():
  raise RuntimeError("out of the blue")


def test_a_crashed_run_goes_on_bit_for_bit_and_repeats_no_row(straight, tmp_path):
  path, digest = straight
  # Saved at 4, crashed in step 5: step 5 is computed twice, and its first row goes.
  with pytest.raises(RuntimeError):
    loop.train(toy.make_run(hooks=[Probe(at=5, do=crash)]), str(tmp_path))
  assert status(tmp_path) == ("failed", 4, 1)
  assert [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4, 5]
  probe = Probe()
  state = loop.train(toy.make_run(hooks=[probe]), str(tmp_path))
  assert state_lib.digest(state) == digest
  assert losses(tmp_path) == losses(path)
  assert probe.seen == [(5, 5), (6, 6)]
  assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl") if "probe" in row] == [1, 2, 3, 4, 5, 6]
  assert [row["attempt"] for row in read_rows(tmp_path / "metrics.jsonl") if "loss" in row] == [1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_current_step_and_the_run_goes_on_from_it(straight, tmp_path, number):
  assert threading.current_thread() is threading.main_thread()
  handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  send = Probe(at=3, do=lambda: os.kill(os.getpid(), number))
  with pytest.raises(Preempted, match=f"{number.name}: stopped after step 4") as error:
    loop.train(toy.make_run(every=100, hooks=[send]), str(tmp_path))
  assert error.value.exit_code == 75
  assert status(tmp_path) == ("preempted", 4, 1)
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
  state = loop.train(toy.make_run(every=100), str(tmp_path))
  assert state_lib.digest(state) == straight[1]
  assert losses(tmp_path) == losses(straight[0])


def test_after_one_signal_the_next_ends_the_process():
  with loop.Signals() as signals:
    assert signals.asked(1) is None
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.asked(2) == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def never_finite(params, batch, key, carried):
  total, metrics = toy.loss_fn(params, batch, key, carried)
  return jnp.where(batch.ids_B[0] >= 32, jnp.nan, 1.0) * total, metrics


def test_too_many_steps_that_are_not_finite_stop_the_run(tmp_path):
  with pytest.raises(DivergedError, match="3 steps in a row up to step 5") as error:
    loop.train(toy.make_run(steps=20, loss=never_finite, train=dict(max_skips=2)), str(tmp_path))
  assert error.value.exit_code == 70
  assert status(tmp_path)[0] == "failed"
  rows = read_rows(tmp_path / "metrics.jsonl")
  assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1]
  assert rows[-1]["grad_norm"] is None  # strict JSON has no NaN


def test_only_the_first_step_compiles(tmp_path):
  compiled = []
  at_step = Probe(every=1)
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(at_step.seen[-1:]) if "backend_compile" in event else None
  )
  try:
    run = toy.make_run(steps=4, every=100, hooks=[at_step], mesh=dict(data=2, fsdp=2, tensor=2))
    state = loop.train(run, str(tmp_path))
  finally:
    jax.monitoring.clear_event_listeners()
  assert state.params["embed"].sharding.spec == jax.sharding.PartitionSpec("tensor", "fsdp")
  assert [] in compiled  # the first step, before the first hook
  assert [seen for seen in compiled if seen and seen[0][0] < 4] == []  # until the last step, which saves


def test_clocks_give_rates_and_fractions(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(writers.time, "monotonic", lambda: now[0])
  clocks = writers.Clocks()
  with clocks.wait("data"):
    now[0] = 1.0
  clocks.count("steps", 8)
  now[0] = 4.0
  assert clocks.read() == dict(steps_per_second=2.0, wait_data=0.25)
  now[0] = 6.0
  assert clocks.read() == dict(wait_data=0.0)


def test_a_line_says_loss_first_and_when_it_ends(monkeypatch, capsys):
  now = [0.0]
  monkeypatch.setattr(writers.time, "monotonic", lambda: now[0])
  progress = writers.Progress(10, 110)
  now[0] = 60.0
  progress.show(20, dict(accuracy=0.5, bits_per_byte=2.0, loss=1.25, nats=5.0, wait_data=0.25))
  line = "step 20/110 loss 1.25 bits_per_byte 2 accuracy 0.5 wait_data 25.0% eta 9m00s\n"
  assert capsys.readouterr().out == line


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_on_a_terminal_there_is_a_bar_and_lines_stand_above_it(monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr("sys.stdout", terminal)
  progress = writers.Progress(2, 4)
  progress.say("going on")
  progress.show(3, dict(accuracy=0.5, loss=1.25))
  progress.advance(3)
  progress.close()
  text = terminal.getvalue()
  assert "going on\n" in text and "| 3/4" in text and "step/s, loss 1.25]" in text
  assert "step 3/4 loss 1.25 accuracy 0.5 eta" in text


def test_only_the_first_process_speaks(capsys):
  progress = writers.Progress(0, 4, quiet=True)
  progress.say("going on")
  progress.show(3, dict(loss=1.25))
  assert capsys.readouterr().out == ""


def test_a_last_row_cut_short_by_a_crash_is_dropped(tmp_path):
  path = writers.epath.Path(tmp_path / "metrics.jsonl")
  path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
  writers.Rows(path, step=1, attempt=2).close()
  assert read_rows(path) == [dict(step=1, loss=2.0)]
