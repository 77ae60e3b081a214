"""Suite `checkpoint`: how long saving holds up the training, and what it costs in all."""

import atexit
import itertools
import shutil
import tempfile
from collections.abc import Iterator

import jax

from thinking_lm.analysis import bench_problem as problem
from thinking_lm.analysis.bench import Bar, Case, Variant, ratio
from thinking_lm.training.checkpoint import CheckpointConfig, Checkpoints

V, B, T = 512, 16, 256


def cases() -> Iterator[Case]:
  """The decoder of the bars with AdamW: 15 MB of parameters, 46 MB of state."""
  every = CheckpointConfig().every
  share = lambda name: lambda r: ratio(r, name, "step") / every
  bars = (
    Bar(f"a save holds up the training / {every} steps", share("save"), 0.02),
    Bar("a save with all that runs beside / as many steps", share("save_and_end"), 0.02),
  )
  yield Case(f"V{V}_B{B}_T{T}", lambda: list(variants(problem.model(V), B, T, _scratch())), bars)


def _scratch() -> str:
  """A directory that goes with the process."""
  directory = tempfile.mkdtemp(prefix="bench_checkpoint")
  atexit.register(shutil.rmtree, directory)
  return directory


def variants(model, B: int, T: int, directory: str) -> Iterator[Variant]:
  """The training step, the call that starts to save its state, and saving until the checkpoint is there."""
  train, state = problem.train_step(model, problem.plain(model))
  step, batch = jax.jit(train), problem.batch(B, T, model.vocabulary_size)
  checkpoints, numbers = Checkpoints(directory, CheckpointConfig(keep_last=1), {}), itertools.count()

  def save():
    checkpoints.save(next(numbers), state)

  def save_and_end():
    save()
    checkpoints.wait()

  yield Variant("step", step, (state, batch), tokens=B * T, compiled=False)
  yield Variant("save", save, compiled=False, after=checkpoints.wait)
  yield Variant("save_and_end", save_and_end, compiled=False)
