"""Bernoulli contexts: y is 1 with probability p_c in context c; does what the model says of y become p_c?

Purpose: under a proper score the best report is the truth; under a 0/1 score any confidence is as good as another.
Command: python -m thinking_lm.train --config=configs/bernoulli.py[:RECIPE] --workdir=runs/bernoulli
  [--config.objective.scoring=zero_one], then python -m thinking_lm.evaluate --workdir=runs/bernoulli: its table of
  calibration has the ECE of the report.
Cost: about 0.15 CPU-seconds a step.
Measured: not run to its end, the ECE of the report is not known. At batch_size 32, steps 300, after 200 of them: Brier
  score of the reports of one batch, seeds 0 to 2, -0.355, -0.346, -0.365, and with scoring=zero_one on the same batches
  -0.367, -0.381, -0.402 (expected of the truth -0.340, of "one half" always -0.500). The tables of
  tests/objectives/scores_test.py show both directions to the end.
"""

from thinking_lm import experiment, recipes


def get_config(recipe="verbalised"):
  """One layer of width 32; the recipe's report, with no thinking before it and paid by its score alone."""
  config = experiment.default_config()
  config.data.source = "task"
  config.data.task.name = "bernoulli_contexts"
  config.data.task.contexts = 5
  config.data.task.length = 8
  config.data.task.eval_examples = 2048
  config.data.sequence_length = 0
  config.model.layers = 1
  config.model.width = 32
  config.model.heads = 2
  config.thought.placement = "every"
  config.train.steps = 600
  config.train.batch_size = 64
  config.train.log_every = 50
  config.checkpoint.every = 600
  config.optimizer.learning_rate = 3e-3
  config.optimizer.schedule = "wsd"
  config.optimizer.warmup_steps = 20
  config.optimizer.weight_decay = 0.0
  recipes.apply(config, recipe)
  if recipe == "verbalised":
    config.thought.length = 2 * config.thought.report
    config.thought.halting = "fixed"
    config.objective.price = 0.0
    config.objective.reward = "proper_score"
    config.objective.calibration_weight = 0.0
  return config
