"""CoT2 (Gozeten et al. 2025, arXiv:2505.23648): think tokens are mixtures of embeddings.

From the paper: softmax-weighted embeddings as think tokens, real gradients through them.
Departs: no supervision of the mixtures (theirs match the distribution of the possible states), modular arithmetic
and not minimum non-negative sums; four think tokens before the answer; their policy gradient over means of several
drawn tokens is not here (--config.thought.kind=noisy has one over mixtures with noise).
Command: python -m thinking_lm.train --config=configs/recipes/cot2.py --workdir=runs/cot2
Measured: not run at length.
"""

from thinking_lm import experiment, recipes


def get_config():
  """The recipe on a small run; see the file's docstring."""
  config = recipes.start(experiment.default_config(), "answers")
  return recipes.apply(config, "cot2")
