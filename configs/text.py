"""A small byte-level decoder on the embedded corpus (Python's own language reference), thinking every 8 bytes.

Purpose: the main job at the smallest size; bring your own text with --config.data.source=text --config.data.input=GLOB.
Command: python -m thinking_lm.train --config=configs/text.py[:RECIPE] --workdir=runs/text
Measured: see "Text: a null" in BUILD_NOTES.md.
"""

from thinking_lm import experiment, recipes


def get_config(recipe="latent"):
  """Two layers of width 128 on rows of 128 bytes."""
  config = experiment.default_config()
  config.data.source = "default"
  config.data.sequence_length = 128
  config.data.align = 8
  config.model.layers = 2
  config.model.width = 128
  config.thought.placement = "stride"
  config.thought.stride = 8
  config.train.steps = 400
  config.train.batch_size = 16
  config.train.log_every = 20
  config.checkpoint.every = 200
  config.optimizer.learning_rate = 3e-3
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 40
  return recipes.apply(config, recipe)
