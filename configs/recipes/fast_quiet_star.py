"""Fast Quiet-STaR (Huang et al. 2025, arXiv:2505.17746): Quiet-STaR with fewer and fewer think tokens.

From the paper: the curriculum. A model that was trained to think long goes on with shorter thoughts, in stages, and
ends without any (their NTP variant). Stage k is one run of its own that starts from the parameters of the one
before:
  python -m thinking_lm.train --config=configs/recipes/fast_quiet_star.py:0 --workdir=runs/f0
  ... --config=configs/recipes/fast_quiet_star.py:1 --workdir=runs/f1 --config.train.init_from=runs/f0
Departs: as quiet_star.py does; lengths 9, 6, 3, 0 are ours; the last stage is plain next-token training and not
their reinforcement fine-tuning; the optimizer starts anew in every stage.
Measured: not run at length.
"""

from thinking_lm import experiment, recipes

LENGTHS = (9, 6, 3, 0)


def get_config(stage="0"):
  """Stage 0 ... 3 of the curriculum."""
  length = LENGTHS[int(stage)]
  config = recipes.apply(recipes.start(experiment.default_config(), "text"), "quiet_star" if length else "none")
  config.thought.placement = "stride"
  config.thought.stride = 4
  config.thought.length = length
  return config
