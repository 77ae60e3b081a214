"""Reinforcement Pre-Training (Dong et al. 2025, arXiv:2506.08007): think, say the next token, be paid if it is right.

From the paper: reward only, no NLL; GRPO over 8 thoughts and sampled answers, drawn at temperature 0.8; 1 where the
answer's bytes begin what really comes and end where one of its tokens does; only at tokens that are hard to predict,
by entropy.
Departs: the answer is what the model goes on with behind its thought, of a fixed number of tokens (one; set
thought.answer), and not what it writes between marks, as long as it likes; thoughts of at most 8 tokens where theirs
have thousands; a model from scratch has nothing to say yet, so start from one that was trained:
--config.train.init_from=runs/text. The threshold of 2 nats (thought.need_above) is ours, and the entropy is the model's
own and over all tokens, not that of a proxy's 16 likeliest (thought.proxy=DIR makes it a proxy's). Groups that are paid
alike stay in the average at every step (objective.advantage=dapo leaves them out).
Command: python -m thinking_lm.train --config=configs/recipes/rpt.py --workdir=runs/rpt
Measured: not run at length.
"""

from thinking_lm import experiment, recipes


def get_config():
  """The recipe on a small run; see the file's docstring."""
  config = recipes.start(experiment.default_config(), "text")
  config.thought.placement = "entropy"
  config.thought.cap = 8
  config.thought.room = 8
  return recipes.apply(config, "rpt")
