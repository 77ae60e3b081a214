"""Quiet-STaR (Zelikman et al. 2024, arXiv:2403.09629): a sampled thought after every token, mixed in by a head.

From the paper: private thoughts between START and STOP rows, 4 look-ahead tokens, REINFORCE on the look-ahead's log
probability against the mean of the samples, clamped at 0, NLL through the mixture. n counts sampled tokens only:
their 12 ahead with the delimiters and the token itself are 9 here.
Departs: the mixture is one of probabilities and its weight is bounded by a sigmoid, so that a bad thought costs at most
-log(1 - weight) nats; theirs is one of logits, and nothing bounds its weight (--config.thought.mixing=logit is theirs).
A small decoder from scratch and not Mistral 7B, two samples, every fourth anchor (their every token costs 19
passes here), START and STOP are learned from scratch and get no larger learning rate; the score
term weighs 1, where their code multiplies it by a million.
Command: python -m thinking_lm.train --config=configs/recipes/quiet_star.py --workdir=runs/quiet_star
Measured: not run at length.
"""

from thinking_lm import experiment, recipes


def get_config():
  """The recipe on a small run; see the file's docstring."""
  config = recipes.apply(recipes.start(experiment.default_config(), "text"), "quiet_star")
  config.thought.placement = "stride"
  config.thought.stride = 4
  return config
