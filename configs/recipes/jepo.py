"""JEPO (Tang et al. 2025, arXiv:2503.19618): the log of the mean probability of the answer over G thoughts.

From the paper: the gradient of the bound M for G = 4 thoughts with leave-one-out credit (their equation 7, the credit
as it is), sampled at temperature 1, one thought between question and answer, outcomes summed over the answer's tokens,
KL to the reference with weight 0.001.
Departs: their experiments divide the credit by its standard deviation, clip it to [-1, 1], take its mean and not its
sum over the group, weigh the NLL term by 0 to 0.01 on short answers and punish a missing format; none of that is here.
A small decoder from scratch (theirs is instruction-tuned), modular arithmetic, one think token.
Command: python -m thinking_lm.train --config=configs/recipes/jepo.py --workdir=runs/jepo
Measured: not run at length.
"""

from thinking_lm import experiment, recipes


def get_config():
  """The recipe on a small run; see the file's docstring."""
  config = recipes.apply(recipes.start(experiment.default_config(), "answers"), "jepo")
  config.thought.topology = "persistent"
  config.thought.lookahead = 0
  config.objective.kl_weight = 1e-3
  return config
