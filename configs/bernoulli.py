"""Bernoulli contexts: y is 1 with probability p_c in context c; does what the model says of y become p_c?

Purpose: under a proper score the best report is the truth; under a 0/1 score any confidence is as good as another.
Command: python -m thinking_lm.train --config=configs/bernoulli.py[:RECIPE] --workdir=runs/bernoulli
  [--config.objective.scoring=zero_one], then python -m thinking_lm.evaluate --workdir=runs/bernoulli: its table of
  calibration has the ECE of the report.
Cost: about 0.1 CPU-seconds a step.
Measured (commit "Bernoulli contexts: 600 smaller steps ...", on 5453381): ECE of the report, test split of 2,048
  rows, seeds 0 to 4: 0.017, 0.021, 0.015, 0.023, 0.012, all below 0.03 (of the softmax 0.019 to 0.028); with
  scoring=zero_one, seeds 0 to 2: 0.188, 0.196, 0.213. The bonus was chosen on the validation split of seeds 0 and 2:
  falling from 0.1 it gave 0.010 and 0.022, from 0.3 0.016 and 0.018. One that stays (0.03, 1,500 steps of 64 rows)
  reached 0.036, 0.028, 0.024 at seeds 0 to 2: too little at first, when a policy that has settled is not moved by the
  0.02 of the score that a confidence a tenth off costs, and more than is wanted at the end. The ECE of the top label
  does not see a likely label that is named twice. spherical 0.060, 0.067, 0.051 and clipped_log 0.033, 0.053, 0.046
  (684593c, seeds 0 to 2): above 0.03 with these settings, which were chosen for brier.
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
  config.train.batch_size = 16
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
    config.objective.entropy_weight = 0.3
    config.objective.entropy_steps = 500
  return config
