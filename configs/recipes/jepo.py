"""JEPO (Tang et al. 2025, arXiv:2503.19618): the log of the mean probability of the answer over G thoughts.

From the paper: grad of the bound M for G samples with leave-one-out credit, one thought between question and answer.
Departs: without their KL penalty and format reward (--config.objective.kl_weight adds the first); modular
arithmetic; one think token.
Command: python -m thinking_lm.train --config=configs/recipes/jepo.py --workdir=runs/jepo
Measured: not run at length.
"""

from thinking_lm import experiment, recipes


def get_config():
  """The recipe on a small run; see the file's docstring."""
  config = recipes.apply(recipes.start(experiment.default_config(), "answers"), "jepo")
  config.thought.topology = "persistent"
  config.thought.lookahead = 0
  return config
