"""Parity of up to sixteen signs: a thought before the answer that a head ends (PonderNet, arXiv:2107.05407).

Purpose: steps used against difficulty (the number of signs), and accuracy against think tokens as the price rises.
Command: python -m thinking_lm.frontier --config=configs/parity.py --root=runs/parity --seeds=3 objective.price=0 \
  objective.price=0.005 objective.price=0.03 objective.price=0.1
Measured (the commit that set this config, on 5453381), at price 0.005, test split of 2,048 rows, seeds 0, 1, 2: rank
  correlation of think tokens with the number of signs 0.957 [0.953, 0.960], 0.590 [0.552, 0.625], -0.444 [-0.478,
  -0.404], at 2.02, 2.17, 0.30 think tokens and accuracies of the digit of 1.000, 0.9995, 0.795. Seed 2 hardly thinks
  and gets 12, 13 and 15 signs wrong throughout; so the claim holds where thinking was learned. Of seed 0, one to four
  signs take no token, five to eight one, nine and ten two, more of them four, and no exit but the last is right about
  all. Two layers of width 64 do not follow the difficulty of up to twelve signs (-0.10): they need no steps. Tried on
  the validation split of seed 0: price 0.003 and halt_weight 0.001 end nearly all thoughts at once (0.01, accuracy
  0.88); mlp_width 8 at price and halt_weight 0.01 had learned nothing after 2,500 steps of 64 rows.
  With one XLA thread (NPROC=1, 030c316), which rounds sums differently, the same seeds gave -0.248, 0.698, -0.024:
  whether a seed learns parity hangs on rounding. Price 0: 94 to 98 % of the cap and 0.417, 0.360, 0.486; price 0.1: no
  think token and the plain decoder's loss, on all three. BUILD_NOTES.md has the whole frontier.
"""

from thinking_lm import experiment, recipes

SIGNS = 16


def get_config(recipe="latent"):
  """One layer of width 32, too small to count to sixteen at once; up to four latents stand before the answer."""
  config = experiment.default_config()
  config.data.source = "task"
  config.data.task.name = "parity"
  config.data.task.length = SIGNS
  config.data.sequence_length = 0
  config.data.task.eval_examples = 2048
  config.model.layers = 1
  config.model.width = 32
  config.model.heads = 2
  config.model.mlp_width = 16
  config.train.steps = 1800
  config.train.batch_size = 128
  config.train.log_every = 100
  config.checkpoint.every = 600
  config.optimizer.learning_rate = 3e-3
  config.optimizer.schedule = "wsd"
  config.optimizer.warmup_steps = 100
  config.optimizer.weight_decay = 0.0
  recipes.apply(config, recipe)
  if config.thought.length:
    config.thought.placement = "explicit"
    config.thought.positions = (SIGNS + 1,)  # the document's border, the signs, the equals sign
  if config.thought.length and not config.objective.score_weight:  # a policy's recipe has an end of its own
    config.thought.topology = "private"
    config.thought.length = 4
    config.thought.iterations = 0
    config.thought.halting = "ponder"
    config.objective.halt_weight = 0.005
    config.objective.price = 0.005
  return config
