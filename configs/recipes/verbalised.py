"""A model that says its next-token distribution aloud, and is paid for what it says (RLCR, arXiv:2507.16806, is near).

A thought of at most two tokens, then pairs of a candidate and a confidence; reward: log-probability of the actual
next token plus a proper score of the report, less a price for length.
Departs: RLCR reports one confidence in one answer and is paid 0/1 plus Brier.
Command: python -m thinking_lm.train --config=configs/recipes/verbalised.py --workdir=runs/verbalised
Measured: not run at length.
"""

from thinking_lm import experiment, recipes


def get_config():
  """The recipe on a small run; see the file's docstring."""
  config = recipes.start(experiment.default_config(), "text")
  config.thought.placement = "stride"
  return recipes.apply(config, "verbalised")
