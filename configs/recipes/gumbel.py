"""Straight-through Gumbel-softmax thoughts (Jang et al. 2016, arXiv:1611.01144): hard tokens forward, relaxed backward.

From the paper: the estimator, and a temperature that falls during training.
Departs: as think tokens of a language model; from 1 to 0.5 over the run.
Command: python -m thinking_lm.train --config=configs/recipes/gumbel.py --workdir=runs/gumbel
Measured: not run at length.
"""

from thinking_lm import experiment, recipes


def get_config():
  """The recipe on a small run; see the file's docstring."""
  config = recipes.apply(recipes.start(experiment.default_config(), "answers"), "gumbel")
  config.thought.length = 2
  config.thought.temperature_end = 0.5
  config.thought.temperature_steps = config.train.steps
  return config
