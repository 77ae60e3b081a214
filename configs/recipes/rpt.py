"""Reinforcement Pre-Training (Dong et al. 2025, arXiv:2506.08007): think, say the next token, be paid if it is right.

From the paper: reward only, no NLL; GRPO over 8 thoughts drawn at temperature 0.8; only at tokens that are hard to
predict, by entropy.
Departs: the answer is the most likely token and not a sampled one, so the reward (exact_match) is right or wrong by
argmax; thoughts of at most 8 tokens where theirs have thousands; a model from scratch has nothing to say yet, so
start from one that was trained: --config.train.init_from=runs/text. The threshold of 1 nat is ours.
Command: python -m thinking_lm.train --config=configs/recipes/rpt.py --workdir=runs/rpt
Measured: not run at length.
"""

from thinking_lm import experiment, recipes


def get_config():
  """The recipe on a small run; see the file's docstring."""
  config = recipes.start(experiment.default_config(), "text")
  config.thought.placement = "entropy"
  config.thought.cap = 8
  config.thought.room = 8
  return recipes.apply(config, "rpt")
