"""The quickstart with models and data of a few rows in place of those of its configs: `-m tests.tiny_quickstart`."""

import pathlib

from thinking_lm import errors, quickstart

load = quickstart.load_config


def tiny(part, recipe):
  """As `quickstart.load_config`."""
  values = load(part, recipe)
  values.model.update(layers=1, width=8, heads=2, kv_heads=1, mlp_width=8)
  values.train.update(batch_size=8, tensorboard=False)
  values.data.task.update(length=3, eval_examples=9)
  if part == "text":
    values.data.update(source="text", input=str(pathlib.Path(__file__).with_name("quickstart_test.py")))
    values.data.sequence_length = 16
  return values


if __name__ == "__main__":
  quickstart.load_config = tiny
  errors.run(quickstart.main)
