"""PonderLM-2 (Zeng et al. 2025, arXiv:2509.23184): a latent thought after every token.

From the paper: the last hidden state is fed back once before each next token, at its token's position.
Departs: the serial chain is trained exactly, where theirs is approximated by parallel Jacobi passes; a small decoder.
Command: python -m thinking_lm.train --config=configs/recipes/ponder_lm2.py --workdir=runs/ponder_lm2
Measured: not run at length.
"""

from thinking_lm import experiment, recipes


def get_config():
  """The recipe on a small run; see the file's docstring."""
  config = recipes.start(experiment.default_config(), "text")
  return recipes.apply(config, "ponder_lm2")
