"""Parity of every prefix of eight bits: a thought before each answer that a head ends (PonderNet, arXiv:2107.05407).

Purpose: steps used against difficulty (the number of bits), and accuracy against think tokens as the price rises.
Command: python -m thinking_lm.frontier --config=configs/parity.py --root=runs/parity --seeds=5 objective.price=0 \
  objective.price=0.005 objective.price=1
Departs from the paper: an answer after every bit, not one of 64 at once, since short prefixes are what long ones are
learned from; a transformer's layer in the place of a recurrent cell; a price a token besides their prior.
--config.data.task.name=parity --config.thought.placement=answer is parity as theirs, one answer for a vector.
Measured (3fb6bc4, test split, seeds 0 to 4): rank correlation of think tokens with the number of bits 0.57, 0.65, 0.42,
  0.16, 0.38 at price 0.005 (two seeds had not learned all eight bits), and 0.49, 0.67, 0.40, 0.27, 0.49 after 3,000
  steps (one had not); 96 % of the cap at price 0, no think token at price 1. See "Parity" in BUILD_NOTES.md.
"""

from thinking_lm import experiment, recipes


def get_config(recipe="latent"):
  """One layer of width 32, too small for eight bits at once; up to four latents before every answer."""
  config = experiment.default_config()
  config.data.source = "task"
  config.data.task.name = "word_problem"
  config.data.task.group = "Z2"
  config.data.task.length = 8
  config.data.sequence_length = 0
  config.data.task.eval_examples = 2048
  config.model.layers = 1
  config.model.width = 32
  config.model.heads = 2
  config.model.mlp_width = 16
  config.train.steps = 1500
  config.train.batch_size = 128
  config.train.log_every = 100
  config.checkpoint.every = 500
  config.optimizer.learning_rate = 3e-3
  config.optimizer.schedule = "wsd"
  config.optimizer.warmup_steps = 100
  config.optimizer.weight_decay = 0.0
  recipes.apply(config, recipe)
  if config.thought.length:
    config.thought.placement = "every"
  if config.thought.length and not config.objective.score_weight:  # a policy's recipe has an end of its own
    config.thought.topology = "private"
    config.thought.length = 4
    config.thought.iterations = 0
    config.thought.halting = "ponder"
    config.objective.halt_weight = 0.005
    config.objective.price = 0.005
  return config
