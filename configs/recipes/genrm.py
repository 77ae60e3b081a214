"""A generative verifier with a latent thought before its verdict (GenRM, Zhang et al. 2024, arXiv:2408.15240).

configs/verifier.py has the whole protocol: a solver, candidates, verdicts, best-of-N. This is its verifier.
From the paper: Yes or No as next tokens, mixed with solutions (lambda = 1/3), p(Yes) as a score.
Departs: the rationale is a latent thought, of which there is one for a candidate, where theirs is drawn as text and the
score a mean over K of them: --config.thought.kind=sampled, and then `verify --rationales=K`, has that mean;
--config.data.verdicts.rationale=True and recipe none is their written one.
Command: python -m thinking_lm.train --config=configs/recipes/genrm.py --config.data.input=FILE.jsonl
--workdir=runs/genrm
Measured: see "Verifiers" in BUILD_NOTES.md.
"""

from thinking_lm import experiment, recipes


def get_config():
  """The recipe on a small run; see the file's docstring."""
  config = recipes.start(experiment.default_config(), "answers")
  config.data.source = "verdicts"
  config.data.verdicts.solutions = 1 / 3
  return recipes.apply(config, "latent")
