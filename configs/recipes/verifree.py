"""VeriFree (Zhou et al. 2025, arXiv:2505.21493): a thought is paid the probability of the reference answer.

From the paper: grad P, that is reward p(answer | thought), leave-one-out baseline, and the NLL term weighed by p.
Departs: modular arithmetic; one think token; four thoughts a prompt; a small decoder from scratch, for which p is tiny
at first: start from a trained one with --config.train.init_from=DIR.
Command: python -m thinking_lm.train --config=configs/recipes/verifree.py --workdir=runs/verifree
Measured: not run at length.
"""

from thinking_lm import experiment, recipes


def get_config():
  """The recipe on a small run; see the file's docstring."""
  config = recipes.apply(recipes.start(experiment.default_config(), "answers"), "verifree")
  config.thought.topology = "persistent"
  config.thought.lookahead = 0
  return config
