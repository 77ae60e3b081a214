"""Parity of up to eight signs: a thought before the answer that a head ends (PonderNet, arXiv:2107.05407).

Purpose: steps used against difficulty (the number of signs), and accuracy against think tokens as the price rises.
Command: for price in 0 0.01 0.03 0.1 0.3; do
  python -m thinking_lm.train --config=configs/parity.py --workdir=runs/parity-$price --config.objective.price=$price
  python -m thinking_lm.evaluate --workdir=runs/parity-$price --split=test --controls=own,none --generate=false
done; python -m thinking_lm.frontier --split=test runs/parity-*
Measured: not run at length.
"""

from thinking_lm import experiment, recipes

SIGNS = 8


def get_config(recipe="latent"):
  """Two layers of width 64; the thought stands before the answer, up to eight tokens long."""
  config = experiment.default_config()
  config.data.source = "task"
  config.data.task.name = "parity"
  config.data.task.length = SIGNS
  config.data.sequence_length = 0
  config.model.layers = 2
  config.model.width = 64
  config.train.steps = 2000
  config.train.batch_size = 128
  config.train.log_every = 100
  config.checkpoint.every = 500
  config.optimizer.learning_rate = 1e-3
  config.optimizer.schedule = "wsd"
  config.optimizer.warmup_steps = 100
  config.optimizer.weight_decay = 0.0
  recipes.apply(config, recipe)
  if config.thought.length:
    config.thought.placement = "explicit"
    config.thought.positions = (SIGNS + 1,)  # the document's border, the signs, the equals sign
  if config.thought.length and not config.objective.score_weight:  # a policy's recipe has an end of its own
    config.thought.topology = "private"
    config.thought.length = 8
    config.thought.iterations = 0
    config.thought.halting = "ponder"
    config.objective.halt_weight = 0.01
  return config
