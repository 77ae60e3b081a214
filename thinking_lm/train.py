"""Trains a model, or goes on training it.

  python -m thinking_lm.train --config=configs/NAME.py --workdir=DIR [--config.key=value ...]

The same command on the same work directory goes on from its newest checkpoint. Exit codes: 0 finished, 64 wrong command
line, 65 damaged data or checkpoints, 70 diverged, 73 work directory unusable or in use, 74 a checkpoint could not be
written, 75 stopped by a signal with everything saved, 78 wrong config. After 74 and 75 the same command may simply be
started again.
"""

import dataclasses

from absl import flags, logging
from ml_collections import config_flags

from thinking_lm import config as config_lib
from thinking_lm import errors

# Unknown keys are let through: `experiment.parse` lists them all at once, with what it found near.
_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file; --config.key=value changes a key of it.",
  lock_config=False,
  accept_new_attributes=True,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, created if missing; gs:// paths also work.")


def main(argv) -> None:
  """Parses the config, builds the experiment and trains it."""
  del argv
  if not flags.FLAGS["config"].present or not _WORKDIR.value:
    raise errors.UsageError("--config=configs/NAME.py and --workdir=DIR are needed; see --help")
  import jax

  from thinking_lm import experiment
  from thinking_lm.analysis import chips, traffic
  from thinking_lm.training import loop, mesh, workdir

  values = config_lib.of_flag(_CONFIG)
  if values.get("train", {}).get("distributed") is True:  # before the devices are counted
    mesh.join("train.distributed")
  config = experiment.parse(values, here=True)
  built = experiment.build(config)
  for name, count in built.data.counts.items():
    if count:
      logging.warning("data: %d %s", count, name.replace("_", " "))
  data, parameters = built.data, built.model.size
  work = traffic.work(config, data.vocabulary.size, data.sequence_length, parameters, chips.peak(jax.devices()))
  loop.train(dataclasses.replace(built.run(), work=work), _WORKDIR.value)
  path = workdir.resolve(_WORKDIR.value)
  places = dict(checkpoints="checkpoints", metrics="metrics.jsonl", tensorboard="tensorboard")
  for name, place in places.items():
    if (path / place).exists():
      print(f"{name}: {path / place}")


def _help() -> str:
  """The module's docstring and every config option, for `--help`."""
  from thinking_lm import experiment

  return f"{__doc__}\nConfig options:\n{config_lib.describe(experiment.ExperimentConfig)}\n".replace("%", "%%")


if __name__ == "__main__":
  __doc__ = _help()  # What absl prints for --help.
  errors.run(main)
