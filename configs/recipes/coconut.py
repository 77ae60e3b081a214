"""Coconut (Hao et al. 2024, arXiv:2412.06769): latent thoughts take the place of written steps, stage after stage.

From the paper: latent thoughts (the last hidden state fed back) between question and answer, 2 for each step that is
no longer written; stage k leaves out the first k written steps and starts from the parameters of stage k - 1; the
optimizer starts anew in every stage.
  python -m thinking_lm.train --config=configs/recipes/coconut.py:0 --workdir=runs/c0
  python -m thinking_lm.train --config=configs/recipes/coconut.py:1 --workdir=runs/c1 --config.train.init_from=runs/c0
Departs: modular arithmetic of 3 operands, whose steps a program writes; a small decoder from scratch and not GPT-2;
START and STOP rows mark the thoughts, as theirs do.
Measured: not run at length.
"""

from thinking_lm import experiment, recipes

STEPS = 3


def get_config(stage="0"):
  """Stage 0 (all steps written, no thoughts) ... 3 (none written)."""
  config = recipes.start(experiment.default_config(), "answers")
  recipes.apply(config, "latent" if int(stage) else "none")
  config.data.task.length = STEPS
  config.data.task.written = STEPS - int(stage)
  config.thought.length = 2 * int(stage)
  config.thought.delimiters = True
  return config
