"""LaTRO (Chen et al. 2024, arXiv:2411.04282): a rationale is paid the log-probability of the answer, both gradients.

From the paper: grad J with a leave-one-out baseline over K rationales, KL to the reference in the objective (their
penalty is in the reward; ours is a term of its own with the same minimum), one rationale between question and
answer.
Departs: modular arithmetic and rationales of at most 4 tokens; a small decoder from scratch. The recipe `hybrid` is
the same without KL and STOP.
Command: python -m thinking_lm.train --config=configs/recipes/latro.py --workdir=runs/latro
Measured: not run at length.
"""

from thinking_lm import experiment, recipes


def get_config():
  """The recipe on a small run; see the file's docstring."""
  config = recipes.start(experiment.default_config(), "answers")
  return recipes.apply(config, "latro")
