"""Suite `data`: rows of packed bytes made on the host, and how long a step waits for them."""

from collections.abc import Iterator

import jax

from thinking_lm.analysis import bench_problem as problem
from thinking_lm.analysis.bench import Bar, Case, Variant, ratio
from thinking_lm.data import pipeline

T, B, BATCHES = 1024, 4, 64


def cases() -> Iterator[Case]:
  """Reading alone in this thread; then beside a step, made ahead by the default threads."""
  speed = Bar("tokens/s of one thread", lambda r: r["read"].tokens_per_second, 1.5e6, at_most=False)
  yield Case(f"bytes_T{T}", lambda: [_reading()], (speed,))
  wait = Bar("wait for a batch / step", lambda r: ratio(r, "batch", "step"), 0.02)
  yield Case(f"wait_T{T}_B{B}", lambda: list(waiting(problem.model)), (wait,))


def _data(**options) -> pipeline.Data:
  return pipeline.build(pipeline.DataConfig(sequence_length=T, **options))


def _reading() -> Variant:
  batches = _data(threads=0).batches("train", global_batch=B)

  def read():
    for _ in range(BATCHES):
      next(batches)

  return Variant("read", read, tokens=BATCHES * B * T, compiled=False)


def waiting(make_model) -> Iterator[Variant]:
  """The training step of the model that `make_model` gives for V, and the next batch, after a step that hid its making.

  What is measured of a batch is what the host does while the step's thread waits for it, its own threads included.
  """
  data = _data()
  batches, model = data.batches("train", global_batch=B), make_model(data.vocabulary.size)
  train, state = problem.train_step(model, problem.plain(model))
  step, first = jax.jit(train), next(batches)
  once = lambda: jax.block_until_ready(step(state, first))
  yield Variant("step", once, tokens=B * T, compiled=False)
  yield Variant("batch", lambda: next(batches), tokens=B * T, compiled=False, after=once)
