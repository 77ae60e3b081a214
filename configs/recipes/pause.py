"""Pause tokens (Goyal et al. 2023, arXiv:2310.02226): time to think, and nothing thought.

From the paper: one learned token, 10 times before the answer.
Departs: a small decoder that only ever trains with them; their pretraining puts them at random places.
Command: python -m thinking_lm.train --config=configs/recipes/pause.py --workdir=runs/pause
Measured: not run at length.
"""

from thinking_lm import experiment, recipes


def get_config():
  """The recipe on a small run; see the file's docstring."""
  config = recipes.apply(recipes.start(experiment.default_config(), "answers"), "pause")
  config.thought.length = 10
  return config
