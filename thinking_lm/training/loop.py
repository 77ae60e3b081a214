"""The training loop. It is short and knows neither the model nor the objective: a step, then what hangs on it."""

import contextlib
import dataclasses
import functools
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from thinking_lm import types
from thinking_lm.config import option
from thinking_lm.errors import ConfigError, DivergedError, Preempted
from thinking_lm.training import mesh as mesh_lib
from thinking_lm.training import state as state_lib
from thinking_lm.training import storage, warm, workdir, writers
from thinking_lm.training.alarms import Watch
from thinking_lm.training.checkpoint import CheckpointConfig, Checkpoints, list_steps, verify
from thinking_lm.training.optimizer import (
  OptimizerConfig,
  changed_rates,
  make_optimizer,
  make_schedule,
  schedule_faults,
)
from thinking_lm.training.step import TOKENS, CarryFn, DrawFn, LossFn, StepConfig, make_train_step, unchanged


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """How long and how much at a time."""

  steps: int = option(1000, "steps of the whole run", low=1)
  batch_size: int = option(32, "rows of a step, over all devices, hosts and micro-batches", low=1)
  accumulation: int = option(1, "micro-batches of a step: less memory, the same gradient", low=1)
  updates: int = option(1, "optimizer updates of a step on thoughts that are drawn once, before the first", low=1)
  init_from: str = option("", "work directory whose parameters this run starts with; empty: fresh ones")
  seed: int = option(0, "everything random derives from it", low=0, high=2**32 - 1)
  log_every: int = option(10, "steps between rows of metrics", low=1)
  max_skips: int = option(5, "non-finite steps in a row after which the run stops", low=1)
  tensorboard: bool = option(True, "also write TensorBoard events")
  distributed: bool = option(False, "join the other hosts with jax.distributed before anything else")

  def faults(self):
    """Lines about rows that the micro-batches do not divide."""
    if self.batch_size % self.accumulation:
      yield f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}"


class Data(Protocol):
  """Where rows come from; any step can be asked for.

  digest: identifies the examples, their order and how they become tokens.
  """

  digest: str

  def batches(self, split: str, *, global_batch: int, start_step: int, share: Sequence[int]) -> Iterator[types.Batch]:
    """The rows `share` of the batches of the steps `start_step`, `start_step + 1`, ... as numpy arrays."""


class Hook(Protocol):
  """Something done every so many steps and after the last one, with a look at the state."""

  every: int

  def __call__(self, step: int, state: state_lib.TrainState) -> Mapping[str, float] | None:
    """Returns numbers for the step's row, if any. Runs before the step's checkpoint is written."""


class Signals:
  """Turns SIGTERM and SIGINT into a wish to stop after the current step; a second one ends the process at once.

  With `jax.distributed` the library owns SIGTERM and agrees on one step for all processes (it knows nothing of SIGINT,
  which one process must not obey alone). This is the only owner otherwise. Outside the main thread no handler can be
  set, and the caller's stand.
  """

  def __init__(self):
    self.distributed = jax.distributed.is_initialized()
    self._wish: str | None = None
    self._before: dict[int, Any] = {}

  def __enter__(self) -> "Signals":
    wanted = () if self.distributed else (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is threading.main_thread():
      self._before = {number: signal.signal(number, self._handle) for number in wanted}
    return self

  def _handle(self, number, frame):
    self._wish = signal.Signals(number).name
    for each in self._before:
      signal.signal(each, signal.SIG_DFL)

  def __exit__(self, *error):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def asked(self, step: int) -> str | None:
    """The signal that asks to stop after `step` finished steps; the same answer on all processes."""
    if self.distributed:
      return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
    return self._wish


class Board:
  """The numbers of a run on their way out, fetched one step late, so that the device always has the next step to do."""

  def __init__(
    self,
    path: epath.Path,
    config: TrainConfig,
    progress: writers.Progress,
    step: int,
    attempt: int,
    watch: Watch | None = None,
    work: writers.Work | None = None,
  ):
    self._config, self._progress, self._watch, self._work = config, progress, watch, work
    if watch is not None:  # in every process: an alarm that stops the run must stop all of them
      watch.replay([row for row in writers.read_rows(path / "metrics.jsonl") if row["step"] <= step])
    self._pending: tuple[int, dict] | None = None
    self._sinks: list = []
    if jax.process_index() == 0:
      self._sinks.append(writers.Rows(path / "metrics.jsonl", step, attempt))
      if config.tensorboard and storage.is_local(path):
        self._sinks.append(writers.TensorBoard(path / "tensorboard", step))
    self.clocks = writers.Clocks()

  def put(self, step: int, metrics: dict) -> None:
    """Takes the metrics of a step that may still be running, and shows those of the step before."""
    ready, self._pending = self._pending, (step, metrics)
    if ready is not None:
      self._show(*ready)

  def settle(self) -> None:
    """Waits for the pending step and shows it."""
    ready, self._pending = self._pending, None
    if ready is not None:
      self._show(*ready)
    for sink in self._sinks:
      sink.flush()

  def _show(self, step: int, metrics: dict) -> None:
    metrics = jax.device_get(metrics)
    for name in TOKENS:
      if name in metrics:
        self.clocks.count(name, float(metrics[name].total))
    self.clocks.count("steps", 1)
    self._progress.advance(step)
    skips = int(metrics["skips_in_a_row"].total)
    if skips:
      logging.warning("step %d was skipped: its loss or gradient is not finite (%d in a row)", step, skips)
    if step % self._config.log_every == 0 or step == self._config.steps:
      rates = self.clocks.read()
      rates |= self._work.rates(rates["steps_per_second"]) if self._work else {}
      self.write(step, {**writers.derived(metrics), **rates})
    if skips > self._config.max_skips:
      raise DivergedError(
        f"{skips} steps in a row up to step {step} had a non-finite loss or gradient (train.max_skips is "
        f"{self._config.max_skips}); their updates were not applied. Lower optimizer.learning_rate or look at the data"
      )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """A row for a step, everywhere, with the alarms that it raises. Raises DivergedError if one stops the run."""
    try:
      alarms = self._watch(step, values) if self._watch else {}
    except DivergedError:
      self._spread(step, values)
      raise
    self._spread(step, {**values, **alarms})

  def _spread(self, step: int, values: Mapping[str, float]) -> None:
    for sink in self._sinks:
      sink.write(step, values)
    self._progress.show(step, values)

  def close(self) -> None:
    """Closes the files; what is pending is lost."""
    for sink in self._sinks:
      sink.close()


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything a run is made of, as plain objects.

  init_fn: key -> parameters. axes: see `mesh.shardings`. loss_fn: see `step.LossFn`. data: see `Data`.
  carry_init, carry_update: what the objective carries from step to step; see `state.CarryInit` and `step.CarryFn`.
  watch: what looks at every row and raises alarms. work: the FLOPs of a step, for its rates.
  carry_from: member of that, shaped like the parameters -> work directory whose parameters it starts as.
  draw_fn: for train.updates above 1; see `step.DrawFn`.
  optional: names (or beginnings) of parameters that a run may have and the one it starts from not, or the reverse.
  resolved_config: nested dict of JSON values, what `config.json` will say and what another start must agree with.
  record: what every checkpoint's manifest says besides, for its readers.
  """

  init_fn: Callable[[jax.Array], types.Params]
  axes: Any
  loss_fn: LossFn
  data: Data
  train: TrainConfig
  checkpoint: CheckpointConfig
  optimizer: OptimizerConfig
  mesh: mesh_lib.MeshConfig
  resolved_config: Mapping[str, Any]
  hooks: Sequence[Hook] = ()
  record: Mapping[str, str] = dataclasses.field(default_factory=dict)
  carry_init: state_lib.CarryInit = state_lib.nothing
  carry_update: CarryFn = unchanged
  watch: Watch | None = None
  work: writers.Work | None = None
  carry_from: Mapping[str, str] = dataclasses.field(default_factory=dict)
  draw_fn: DrawFn | None = None
  optional: tuple[str, ...] = ()


def train(run: Run, path: str) -> state_lib.TrainState:
  """Trains in the work directory `path`, going on from what is there, until `train.steps` steps are finished.

  Returns:
    The final state. A run that was finished before is left as it is.

  Raises:
    ConfigError, WorkdirError: before anything is computed.
    DataError: no checkpoint is intact. SaveError: a checkpoint could not be written. DivergedError: see `TrainConfig`.
    Preempted: a signal came; the state is saved.
  """
  faults = schedule_faults(run.optimizer, run.train.steps) + mesh_lib.device_faults(
    run.mesh, run.train.batch_size, run.train.accumulation, jax.device_count()
  )
  if faults:
    raise ConfigError(faults)
  path = workdir.resolve(path)
  workdir.agree_processes(
    workdir.flatten(run.resolved_config, "config.") | {"--workdir": str(path), "the data": run.data.digest}
  )
  with contextlib.ExitStack() as stack:
    signals = stack.enter_context(Signals())
    status = None
    if jax.process_index() == 0:
      stack.enter_context(workdir.hold(path))
      _agree_rates(run, path)
      workdir.agree_config(path, run.resolved_config)
      status = workdir.Status(path)
    checkpoints = Checkpoints(path / "checkpoints", run.checkpoint, dict(data=run.data.digest))
    stack.callback(checkpoints.close)
    session = _Session(path, checkpoints, signals, status)
    try:
      state = _train(run, session)
    except Preempted as error:
      session.record("preempted", str(error))
      raise
    except BaseException as error:
      checkpoints.close()
      session.record("failed", f"{type(error).__name__}: {error}")
      raise
    session.record("finished")
    return state


def _agree_rates(run: Run, path: epath.Path) -> None:
  """Refuses to go on with finished steps beyond the last, or whose learning rates were others: raises ConfigError."""
  old, finished = workdir.config_there(path), max(list_steps(path / "checkpoints"), default=0)
  if run.train.steps < finished:
    raise ConfigError(f"config.train.steps {run.train.steps} is below the {finished} steps that are finished in {path}")
  if old is None:
    return
  before = dataclasses.replace(run.optimizer, schedule_steps=old["optimizer"].get("schedule_steps", 0))
  faults = changed_rates((before, old["train"]["steps"]), (run.optimizer, run.train.steps), finished)
  if faults:
    raise ConfigError(faults)


@dataclasses.dataclass(frozen=True)
class _Session:
  """What one attempt holds on to; `status` is None on all processes but the first."""

  path: epath.Path
  checkpoints: Checkpoints
  signals: Signals
  status: workdir.Status | None

  def record(self, state: str, reason: str = "") -> None:
    if self.status is not None:
      self.status.write(state, self.checkpoints.committed, reason)


@dataclasses.dataclass(frozen=True)
class Program:
  """What a run compiles for a mesh. Nothing is allocated, so that a pod's can be compiled where there is no pod.

  init: key -> the state before the first step. create: parameters -> the same. state: its ShapeDtypeStructs with their
  shardings. step: the jitted training step.
  """

  init: Callable[[jax.Array], state_lib.TrainState]
  create: Callable[[types.Params], state_lib.TrainState]
  state: state_lib.TrainState
  step: Callable

  @property
  def shardings(self) -> state_lib.TrainState:
    """A sharding for every leaf of the state."""
    return jax.tree.map(lambda leaf: leaf.sharding, self.state)


def program(run: Run, mesh: jax.sharding.Mesh) -> Program:
  """The program of a run; call its functions under `jax.set_mesh(mesh)`."""
  optimizer = make_optimizer(run.optimizer, run.axes)
  create = lambda params: state_lib.create(params, optimizer, run.optimizer.ema > 0, run.carry_init)
  init = lambda key: create(run.init_fn(key))
  abstract = jax.eval_shape(init, state_lib.key(run.train.seed, "init"))
  shardings = state_lib.shardings(abstract, run.axes, mesh)
  schedule = make_schedule(run.optimizer, run.train.steps)
  config = StepConfig(run.train.accumulation, run.optimizer.ema, run.train.updates)
  step = make_train_step(run.loss_fn, optimizer, schedule, config, run.carry_update, run.draw_fn)
  step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, mesh_lib.replicated(mesh)))
  return Program(init, create, mesh_lib.placed(abstract, shardings), step)


def _train(run: Run, session: _Session) -> state_lib.TrainState:
  mesh = mesh_lib.make_mesh(run.mesh)
  path, steps = session.path, run.train.steps
  if session.status is not None:
    code = workdir.write_versions(path, jax.devices())
    session.checkpoints.record.update(
      run.record, code=code, config=storage.sha256(storage.canonical(run.resolved_config))
    )
  with jax.set_mesh(mesh):
    made = program(run, mesh)
    state = session.checkpoints.restore(made.state)
    if state is None:
      state = warm.first_state(run, made)
    start = int(state.step)
    with contextlib.closing(writers.Progress(start, steps, quiet=session.status is None)) as progress:
      if start == steps:
        progress.say(f"already complete: {start} steps are finished in {path}")
        return state
      progress.say(f"{'going on from' if start else 'starting at'} step {start} in {path}")
      session.record("running")
      attempt = session.status.attempt if session.status else 0
      with contextlib.closing(Board(path, run.train, progress, start, attempt, run.watch, run.work)) as board:
        return _steps(run, session, board, made.step, state)


def _steps(run: Run, session: _Session, board: Board, step_fn, state: state_lib.TrainState) -> state_lib.TrainState:
  checkpoints, steps = session.checkpoints, run.train.steps
  start, key = int(state.step), state_lib.key(run.train.seed, "train")
  size = run.train.batch_size
  read = functools.partial(run.data.batches, "train", global_batch=size, start_step=start)
  batches = mesh_lib.feed(jax.sharding.get_mesh(), size, read)
  for step in range(start + 1, steps + 1):
    with board.clocks.wait("data"):
      batch = next(batches)
    state, metrics = step_fn(state, batch, key)
    board.put(step, metrics)
    last, asked = step == steps, session.signals.asked(step)
    due = [hook for hook in run.hooks if last or step % hook.every == 0]
    save = last or asked or checkpoints.due(step)
    if due or save:
      # What a checkpoint says is finished has its rows written: a resumed run does not write them again.
      board.settle()
    for hook in due:
      board.write(step, hook(step, state) or {})
    committed = checkpoints.committed
    with board.clocks.wait("checkpoint"):
      checkpoints.check()
      if save:
        checkpoints.save(step, state)
      if last or asked:
        checkpoints.wait()
    if checkpoints.committed != committed:
      session.record("running")
    if asked and not last:
      raise Preempted(f"{asked}: stopped after step {step}, which is saved; the same command goes on from it")
  if session.status is not None:
    verify(checkpoints.path(steps))
  return state
