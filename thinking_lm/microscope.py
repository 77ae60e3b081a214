"""How biased and how noisy are the gradients of a model's thoughts? Every estimator on the same rows and parameters.

  python -m thinking_lm.microscope --workdir=DIR                        a trained run
  python -m thinking_lm.microscope --config=configs/NAME.py:RECIPE      its parameters before training
  python -m thinking_lm.microscope --toy=bias|bottleneck                the published toys, by this project's objectives
  python -m thinking_lm.microscope --toy=transformer|bottleneck_transformer   the same on a small decoder

Each estimator draws --estimates gradients for the same --rows rows of the training split, with --samples thoughts each,
and is compared with grad J, M and P: exact where every thought can be enumerated (vocabulary^length up to 4096; for
persistent thoughts also to the power of the anchors of a row), else the mean of many gradients of an estimator with
--reference_samples thoughts, whose standard error is printed, and whose grad M still has the bias of that many samples.
Where a thought goes, what sees it, its length and its temperature are the run's; its tokens are drawn from the
vocabulary, whatever the run's own are. `own` is the run's objective and kind as they stand, where that draws; baselines
and references with a past are those of the checkpoint. What these thoughts or a trained model without the heads cannot
have is left out, with the reason. Prints tables for all parameters and by part of the model, and writes JSON and (if
matplotlib is there) a plot to DIR/microscope/ or to --output. All of it takes a quarter of an hour for
configs/text.py:hybrid on one core; --estimators, --bounds, --estimates and --reference_samples ask for less.

Of thoughts that are trained by parallel iterations, also how far their gradient is from that of the serial chain.

Exit codes: 0 done, 64 wrong command line, 65 damaged data or checkpoints, 73 the result cannot be written, 78 wrong
config.
"""

import dataclasses
import functools
import importlib.util
import pathlib
import sys
import time
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from thinking_lm import errors
from thinking_lm.errors import ConfigError, UsageError, WorkdirError

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file; --config.key=value changes a key.", lock_config=False, accept_new_attributes=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a trained run; gs:// paths also work.")
_TOY = flags.DEFINE_enum(
  "toy", None, ["bias", "bottleneck", "transformer", "bottleneck_transformer"], "A toy instead of a run or a config."
)
_ESTIMATORS = flags.DEFINE_list("estimators", None, "Lines of the tables; default: all.")
_BOUNDS = flags.DEFINE_list("bounds", ["J", "M", "P"], "Whose gradients the estimators are compared with.")
_ROWS = flags.DEFINE_integer("rows", 4, "Rows of the batch.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 4, "G, thoughts of each anchor in an estimate.", lower_bound=1)
_ESTIMATES = flags.DEFINE_integer("estimates", 64, "Estimates of each estimator.", lower_bound=16)
_REFERENCE = flags.DEFINE_integer("reference_samples", 32, "G of references that are not exact.", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "Of everything that is drawn.", lower_bound=0, upper_bound=2**32 - 1)
_AVERAGED = flags.DEFINE_bool("averaged", False, "The moving average of the parameters (runs with optimizer.ema).")
_OUTPUT = flags.DEFINE_string("output", None, "Directory of the result; default: DIR/microscope.")
_PLOT = flags.DEFINE_bool("plot", None, "Also draw microscope.png; default: if matplotlib is installed.")


class Subject(NamedTuple):
  """What is looked at: an Experiment, its parameters, finished steps, and what its objective carries (carry.py)."""

  run: Any
  params: Any
  step: int
  extra: dict[str, Any]


def _subject() -> Subject:
  """That of the command line."""
  import jax

  from thinking_lm import config as config_lib
  from thinking_lm import experiment
  from thinking_lm.analysis import toys
  from thinking_lm.training import loop, mesh, warm

  if _WORKDIR.value:
    built, params, step = experiment.load(_WORKDIR.value, _AVERAGED.value)
    return Subject(built, params, step, experiment.carried(_WORKDIR.value, built, step))
  if _TOY.value:
    values = experiment.default_config()
    values.update_from_flattened_dict(toys.TRANSFORMER)
  else:
    values = config_lib.of_flag(_CONFIG)
  built = experiment.build(experiment.parse(values))
  here = mesh.everywhere()
  run = built.run(here)
  with jax.set_mesh(here):
    state = warm.first_state(run, loop.program(run, here))
  return Subject(built, state.params, 0, state.extra)


def _estimator(subject: Subject, changes, samples: int):
  """The microscope's Estimator of some settings over a run. Raises ConfigError with why it cannot be."""
  from thinking_lm import config as config_lib
  from thinking_lm import experiment, rules
  from thinking_lm.analysis import estimators, microscope, training
  from thinking_lm.objectives import carry
  from thinking_lm.types import Carried

  run = subject.run
  values = config_lib.to_config_dict(run.config)
  values.update_from_flattened_dict(estimators.settings(changes, run.config.thought, samples))
  config = experiment.parse(values)
  faults = rules.size_faults(config.objective, config.thought, run.data)
  faults += rules.head_faults(config.thought, config.objective, config.data, run.model)
  if faults:
    raise ConfigError(faults)
  run, extra = run.with_config(config), carry.init(config.objective, subject.params)
  carried = Carried(subject.step, extra | {name: subject.extra[name] for name in extra.keys() & subject.extra.keys()})
  read = functools.partial(estimators.read, heads=run.model.heads)
  cost = training.training_flops(
    config, run.data.vocabulary.size, run.data.sequence_length, run.proxy and run.proxy[0].config
  )
  return microscope.Estimator(
    lambda params, batch, key: run.loss_fn(read(params), batch, key, carried),
    cost / config.train.batch_size * _ROWS.value,
    draws=config.thought.random and not config.objective.exact,
  )


def _references(subject: Subject, batch, key):
  """bound -> Reference: exact where possible, else of many samples; with why, where a bound cannot be had at all."""
  from thinking_lm.analysis import estimators, microscope

  found, refused = {}, {}
  for number, bound in enumerate(_BOUNDS.value):
    _progress(f"grad {bound}", number, len(_BOUNDS.value))
    try:
      try:
        one = _estimator(subject, estimators.REFERENCES[bound], 1)
      except ConfigError as error:
        G, changes = _REFERENCE.value, estimators.SAMPLED_REFERENCES[bound]
        one = _estimator(subject, changes, G)
        how = f"mean of {_ESTIMATES.value} estimates with G = {G} ({error})"
        found[bound] = microscope.averaged(microscope.moments(one, subject.params, batch, key, _ESTIMATES.value), how)
      else:
        found[bound] = microscope.exact(microscope.moments(one, subject.params, batch, key, 1), "exact, by enumeration")
    except ConfigError as error:
      refused[f"grad {bound}"] = str(error)
  if not found:
    raise ConfigError([f"there is no {bound}: {why}" for bound, why in refused.items()])
  return found, refused


def _progress(name: str, done: int, total: int) -> None:
  if name:
    print(f"microscope: {done + 1}/{total} {name}", file=sys.stderr, flush=True)


def measure(subject: Subject, names) -> dict:
  """Everything that is printed and written, as JSON values."""
  import jax
  import jax.numpy as jnp

  from thinking_lm.analysis import estimators, microscope
  from thinking_lm.analysis.iterated import iterated
  from thinking_lm.training import state

  run, params = subject.run, subject.params
  if not run.config.thought.length:
    raise ConfigError("there are no thoughts: thought.length is 0")
  batch = jax.tree.map(jnp.asarray, next(run.data.batches("train", global_batch=_ROWS.value)))
  key = state.key(_SEED.value, "evaluate")
  told = iterated(run, params, batch, subject.step, key)
  references, refused = _references(subject, batch, jax.random.fold_in(key, 0))
  chosen = {}
  for name in names:
    try:
      chosen[name] = _estimator(subject, estimators.ESTIMATORS[name], _SAMPLES.value)
    except ConfigError as error:
      refused[name] = "; ".join(error.faults)
  result = microscope.examine(
    chosen, references, params, batch, jax.random.fold_in(key, 1), _ESTIMATES.value, _progress
  )
  settings = dict(rows=_ROWS.value, samples=_SAMPLES.value, estimates=_ESTIMATES.value, seed=_SEED.value)
  thought = dataclasses.asdict(run.config.thought)
  return dict(
    settings | dict(step=subject.step, thought=thought, refused=refused),
    iterated=told,
    references=microscope.describe(references),
    estimators=result,
  )


def _write(found: dict) -> None:
  """JSON, and a plot if there can or must be one. Raises WorkdirError, ConfigError."""
  from thinking_lm.analysis import microscope_report
  from thinking_lm.training import storage, workdir

  place = _OUTPUT.value or (f"{_WORKDIR.value}/microscope" if _WORKDIR.value else None)
  if not place:
    print("\nnothing written: --output=DIR names a place")
    return
  folder = workdir.resolve(place)
  file = folder / f"microscope-{found['step']}.json"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(file, storage.canonical(found | dict(code=workdir.code_version()), indent=2) + "\n")
  except OSError as error:
    raise WorkdirError(f"cannot write {file}: {error}") from error
  print(f"\nwritten: {file}")
  if _PLOT.value or (_PLOT.value is None and importlib.util.find_spec("matplotlib")):
    image = file.with_suffix(".png")
    microscope_report.plot(found, pathlib.Path(image))
    print(f"written: {image}")
  elif _PLOT.value is None:
    print("no plot: matplotlib is not installed (pip install 'thinking_lm[report]')")


def main(argv) -> None:
  """Measures, prints and writes."""
  del argv
  from thinking_lm.analysis import estimators, microscope_report, toys

  if [bool(_WORKDIR.value), _CONFIG.value is not None, bool(_TOY.value)].count(True) != 1:
    raise UsageError("one of --workdir=DIR, --config=FILE and --toy=NAME is needed; see --help")
  if _TOY.value in toys.TOYS:
    print(toys.TOYS[_TOY.value]())
    return
  names = _ESTIMATORS.value or list(estimators.ESTIMATORS)
  for what, given, known in (
    ("estimator", names, estimators.ESTIMATORS),
    ("bound", _BOUNDS.value, estimators.REFERENCES),
  ):
    for name in given:
      if name not in known:
        raise UsageError(f"unknown {what} {name!r}; known: {', '.join(known)}")
  began = time.monotonic()
  subject = _subject()
  found = measure(subject, names)
  thought, step = subject.run.config.thought, subject.step
  own = "" if thought.kind == "sampled" else f" (the run's own are of kind {thought.kind})"
  what = f"{thought.length} sampled think tokens{own}, {thought.topology}, {thought.placement}"
  print(f"step {step}; thoughts: {what}; {_ROWS.value} rows, G = {_SAMPLES.value}, {_ESTIMATES.value} estimates each")
  print(f"{time.monotonic() - began:.0f} s\n\n{microscope_report.table(found)}")
  _write(found)


if __name__ == "__main__":
  __doc__ = __doc__.replace("%", "%%")  # What absl prints for --help.
  errors.run(main)
