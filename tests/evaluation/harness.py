"""Small experiments to evaluate, not trained: what is tested here holds for any parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from thinking_lm import experiment
from thinking_lm.evaluation.evaluators import Runner, evaluate
from thinking_lm.evaluation.hook import EvaluationConfig, hooks
from thinking_lm.training import loop
from thinking_lm.training import mesh as mesh_lib
from thinking_lm.training.writers import read_rows

KEY = jax.random.key(3, impl="threefry2x32")
THOUGHT = dict(kind="sampled", length=1, topology="private", samples=2)


def config(**sections):
  """A tiny word problem; `sections` are dicts of changes, `task` those of data.task."""
  values = experiment.default_config()
  values.data.update(source="task", sequence_length=0, threads=0)
  values.data.task.update(length=6, eval_examples=13)
  values.model.update(layers=1, width=16, heads=2, kv_heads=2, mlp_width=32)
  values.train.update(steps=2, batch_size=8, log_every=1, tensorboard=False)
  values.health.every = 0
  values.data.task.update(sections.pop("task", {}))
  for name, changes in sections.items():
    values[name].update(changes)
  return values


@functools.cache
def _made(key: tuple):
  built = experiment.build(experiment.parse(config(**{name: dict(changes) for name, changes in key})))
  return built, jax.jit(built.init)(jax.random.key(0)), Runner(built)


def make(**sections):
  """(Experiment, parameters, Runner), the same ones for the same arguments: compiling is most of the time here."""
  return _made(tuple((name, tuple(changes.items())) for name, changes in sections.items()))


def run(made, **options):
  """`evaluate` of what `make` gives, on validation, in batches of 4."""
  subject, params, runner = made
  options = dict(key=KEY, batch_size=4, samples=(), runner=runner) | options
  return evaluate(subject, params, "validation", **options)


def feed(size, read):
  """Batches on the devices of the current mesh."""
  return mesh_lib.feed(jax.sharding.get_mesh(), size, read)


def hand(size, read):
  """The same on one device, without a mesh."""
  return (jax.tree.map(jnp.asarray, batch) for batch in read(share=range(size)))


def train(path, every: int, thought=THOUGHT, **objective):
  """Trains three steps, with private sampled thoughts unless told, and a hook every so many. Returns (state, rows)."""
  values = config(thought=thought, objective=objective or dict(score_weight=1.0), train=dict(steps=3))
  built = experiment.build(experiment.parse(values))
  run_ = dataclasses.replace(built.run(), hooks=hooks(EvaluationConfig(every=every, limit=13), built, KEY, feed))
  return loop.train(run_, str(path)), read_rows(path / "metrics.jsonl")
