"""S3 word problem: the running product of 16 group elements, the label asked for at every element.

Purpose: one attention layer is too shallow to track the state; a latent thought after each element can carry it.
Command: python -m thinking_lm.train --config=configs/word_problem.py[:RECIPE] --workdir=runs/word_problem
Measured: see "State tracking" in BUILD_NOTES.md.
"""

from thinking_lm import experiment, recipes


def get_config(recipe="latent"):
  """One layer of width 64. Learning is sudden, so the rate stays at its peak until the last fifth."""
  config = experiment.default_config()
  config.data.source = "task"
  config.data.task.name = "word_problem"
  config.data.task.group = "S3"
  config.data.task.length = 16
  config.data.sequence_length = 0
  config.model.layers = 1
  config.model.width = 64
  config.thought.placement = "every"
  config.train.steps = 600
  config.train.batch_size = 128
  config.train.log_every = 50
  config.checkpoint.every = 200
  config.optimizer.learning_rate = 2e-3
  config.optimizer.schedule = "wsd"
  config.optimizer.warmup_steps = 100
  config.optimizer.weight_decay = 0.0
  return recipes.apply(config, recipe)
