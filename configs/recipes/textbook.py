"""Thinking between sentences, as a reader of a textbook does: thoughts stay in context and pay for what follows.

Not a paper's: near Self-Notes (Lanchantin et al. 2023, arXiv:2305.00833), whose notes are supervised and these are
not. A thought after each sentence end, stopped by STOP, paid the log-probability of all that follows less a price.
Command: python -m thinking_lm.train --config=configs/recipes/textbook.py --workdir=runs/textbook
Measured: not run at length.
"""

from thinking_lm import experiment, recipes


def get_config():
  """The recipe on a small run; see the file's docstring."""
  config = recipes.start(experiment.default_config(), "text")
  return recipes.apply(config, "textbook")
