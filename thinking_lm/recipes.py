"""Recipes: named answers to the four questions about a thought and to the objective. A recipe is config, never code.

    config = experiment.default_config()
    recipes.apply(config, "hybrid")

Config files take the name after a colon: `--config=configs/text.py:hybrid`. Every value can still be changed from the
command line.
"""

from thinking_lm.config import pick

RECIPES = dict(
  none={"thought.length": 0},
  pause={"thought.kind": "pause", "thought.length": 1},
  latent={"thought.kind": "latent", "thought.length": 1},
  soft={"thought.kind": "soft", "thought.length": 1},
  gumbel={"thought.kind": "gumbel", "thought.length": 1},
  nll_only={"thought.kind": "sampled", "thought.length": 1, "thought.samples": 2},
  hybrid={
    "thought.kind": "sampled",
    "thought.length": 1,
    "thought.samples": 4,
    "thought.lookahead": 0,
    "objective.score_weight": 1.0,
    "objective.advantage": "leave_one_out",
  },
  jepo={
    "thought.kind": "sampled",
    "thought.length": 1,
    "thought.samples": 4,
    "thought.topology": "private",
    "objective.bound": "M",
    "objective.score_weight": 1.0,
    "objective.advantage": "jepo",
  },
  verifree={
    "thought.kind": "sampled",
    "thought.length": 1,
    "thought.samples": 4,
    "thought.topology": "private",
    "objective.bound": "P",
    "objective.reward": "prob",
    "objective.score_weight": 1.0,
    "objective.advantage": "leave_one_out",
  },
  verbalised={
    "thought.kind": "sampled",
    "thought.length": 6,
    "thought.report": 2,
    "thought.halting": "stop",
    "thought.samples": 8,
    "thought.topology": "private",
    "objective.score_weight": 1.0,
    "objective.calibration_weight": 1.0,
    "objective.price": 0.01,
    "objective.advantage": "leave_one_out",
  },
)
"""name -> what it sets.

none: the plain decoder. pause: one learned token (Goyal et al. 2023). latent: the last hidden state fed back, trained
by backprop on the real tokens only (Coconut, PonderLM-2). soft: the mean embedding (CoT2). gumbel: straight-through
tokens. nll_only: sampled tokens and only the real tokens' gradient, so that nothing teaches the model what to think.
hybrid: sampled tokens and both terms of grad J; exact for a persistent thought, whose reward is the document's rest.
jepo: both terms of the gradient of the log of the mean probability over G thoughts, with the leave-one-out credit of
JEPO (arXiv:2503.19618); without its penalty on the distance to a reference policy. verifree: both terms of the gradient
of the expected probability (VeriFree, arXiv:2505.21493). Where the papers think once, before an answer, these two think
before the next token; thought.lookahead and the placement give other outcomes. verbalised: at most two tokens of
thought, then two pairs of a candidate and how sure the model is of it, paid by log p(next token) + the Brier score of
that report - the price of the tokens; RLCR (arXiv:2507.16806) is the same with reward exact_match and one confidence in
the model's own answer.
"""


def apply(config, name: str):
  """Sets the values of a recipe in `config`, a ConfigDict, and returns it. Raises ConfigError for an unknown name."""
  config.update_from_flattened_dict(pick(RECIPES, name, "recipe"))
  return config
