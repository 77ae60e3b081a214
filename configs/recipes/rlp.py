"""RLP (Hatamizadeh et al. 2025, arXiv:2510.01265): a thought is paid the information that it gains on the next token.

From the paper: reward log p(next | thought) - log p of a slow copy of the model without one, advantage G / (G - 1)
(r - mean), 16 thoughts an anchor, a clipped surrogate, no NLL term.
Departs: at most 8 think tokens; every eighth byte; a small decoder, best started from a trained one
(--config.train.init_from=runs/text). One update a rollout: set train.updates for the ratios and their clip to matter;
the clip's bounds are this project's. The copy is the same for all thoughts of a group, so that it changes the logged
reward and not this advantage.
Command: python -m thinking_lm.train --config=configs/recipes/rlp.py --workdir=runs/rlp
Measured: not run at length.
"""

from thinking_lm import experiment, recipes


def get_config():
  """The recipe on a small run; see the file's docstring."""
  config = recipes.start(experiment.default_config(), "text")
  config.thought.placement = "stride"
  return recipes.apply(config, "rlp")
