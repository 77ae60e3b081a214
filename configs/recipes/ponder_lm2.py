"""PonderLM-2 (Zeng et al. 2025, arXiv:2509.23184): a latent thought after every token.

From the paper: the last hidden state is fed back once before each next token, at its token's position; the chain of
thoughts is trained by parallel Jacobi passes over the whole interleaved row with the loss on the last one, an
approximation whose error is logged as `residual`. thought.iterations=0 trains the chain itself.
Departs: three such passes, always; theirs are a first guess by a pass over the tokens alone, two or three refinements
(drawn anew each time) and the pass with the loss, where our first guess is a learned embedding. A small decoder.
Command: python -m thinking_lm.train --config=configs/recipes/ponder_lm2.py --workdir=runs/ponder_lm2
Measured: not run at length.
"""

from thinking_lm import experiment, recipes


def get_config():
  """The recipe on a small run; see the file's docstring."""
  config = recipes.start(experiment.default_config(), "text")
  return recipes.apply(config, "ponder_lm2")
