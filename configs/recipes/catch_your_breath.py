"""Catch Your Breath (Galashov et al. 2025, arXiv:2510.13879): a model asks for pauses, and pays for them.

From the paper: pause tokens whose number a model decides at each token; the variational variant (CYB-VA), the
expected loss under the stop distribution plus the distance to a given distribution of stopping times.
Departs: the decision is read off a head and not off a <don't know> token; private thoughts, so that pauses of one
token are not seen by later ones; every eighth byte; at most three pauses, a geometric prior of 1/2 and its weight are
ours.
Command: python -m thinking_lm.train --config=configs/recipes/catch_your_breath.py --workdir=runs/catch_your_breath
Measured: not run at length.
"""

from thinking_lm import experiment, recipes


def get_config():
  """The recipe on a small run; see the file's docstring."""
  config = recipes.start(experiment.default_config(), "text")
  config.thought.placement = "stride"
  return recipes.apply(config, "catch_your_breath")
