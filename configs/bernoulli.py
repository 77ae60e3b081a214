"""Bernoulli contexts: y is 1 with probability p_c in context c; does what the model says of y become p_c?

Purpose: under a proper score the best report is the truth; under a 0/1 score any confidence is as good as another.
Command: python -m thinking_lm.train --config=configs/bernoulli.py[:RECIPE] --workdir=runs/bernoulli
  [--config.objective.scoring=zero_one], then python -m thinking_lm.evaluate --workdir=runs/bernoulli: its table of
  calibration has the ECE of the report.
Cost: about 0.15 CPU-seconds a step.
Measured (586701a): ECE of the report, test split of 2,048 rows, seeds 0 to 2: 0.036, 0.028, 0.024, two of three under
  0.03; with scoring=zero_one, seed 2: 0.280. Without the entropy bonus and with 600 steps, validation split: 0.021,
  0.032, 0.107, and with zero_one 0.057, 0.132, 0.160. There the policy of seed 2 has 0.16 nats a token after 100 steps,
  nearly nothing left to explore with, and a confidence that is a tenth off costs 0.02 of the Brier score only. The
  bonus and the steps were chosen on the validation split of seed 2. What is left at seed 0 is the context of p 0.7,
  said as 0.6 against 1.0 and so 0.63: both confidences would have to move. A likely label named twice, and its rival
  not at all, is another such place; the ECE of the top label does not see it.
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
