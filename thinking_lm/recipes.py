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
  quiet_star={
    "thought.kind": "sampled",
    "thought.length": 9,
    "thought.delimiters": True,
    "thought.topology": "private",
    "thought.placement": "every",
    "thought.samples": 2,
    "thought.lookahead": 4,
    "thought.mixing": "probability",
    "objective.score_weight": 1.0,
    "objective.advantage": "quiet_star",
  },
  rpt={
    "thought.kind": "sampled",
    "thought.length": 8,
    "thought.halting": "stop",
    "thought.topology": "private",
    "thought.samples": 8,
    "thought.temperature": 0.8,
    "thought.answer": 1,
    "objective.nll_weight": 0.0,
    "objective.score_weight": 1.0,
    "objective.reward": "prefix_match",
    "objective.advantage": "grpo",
  },
  rlp={
    "thought.kind": "sampled",
    "thought.length": 8,
    "thought.halting": "stop",
    "thought.topology": "private",
    "thought.samples": 16,
    "objective.nll_weight": 0.0,
    "objective.score_weight": 1.0,
    "objective.reward": "info_gain",
    "objective.teacher_decay": 0.999,
    "objective.advantage": "rlp",
  },
  latro={
    "thought.kind": "sampled",
    "thought.length": 4,
    "thought.halting": "stop",
    "thought.samples": 8,
    "thought.lookahead": 0,
    "objective.score_weight": 1.0,
    "objective.advantage": "leave_one_out",
    "objective.kl_weight": 0.05,
  },
  ponder_lm2={
    "thought.kind": "latent",
    "thought.length": 1,
    "thought.placement": "every",
    "thought.rotary": "anchor",
    "thought.iterations": 3,
  },
  cot2={"thought.kind": "soft", "thought.length": 4, "thought.rotary": "advance"},
  catch_your_breath={
    "thought.kind": "pause",
    "thought.length": 3,
    "thought.topology": "private",
    "thought.halting": "ponder",
    "objective.halt_weight": 0.01,
    "objective.halt_prior": 0.5,
  },
  textbook={
    "thought.kind": "sampled",
    "thought.length": 8,
    "thought.halting": "stop",
    "thought.placement": "sentence",
    "thought.cap": 8,
    "thought.room": 8,
    "thought.samples": 4,
    "thought.lookahead": 0,
    "objective.score_weight": 1.0,
    "objective.advantage": "leave_one_out",
    "objective.price": 0.01,
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
the model's own answer. The others are the papers' own, each with a file in configs/recipes/ that says what it takes
from its paper and where it departs.
"""


def apply(config, name: str):
  """Sets the values of a recipe in `config`, a ConfigDict, and returns it. Raises ConfigError for an unknown name."""
  config.update_from_flattened_dict(pick(RECIPES, name, "recipe"))
  return config


STARTS = dict(
  text={"data.source": "default", "data.sequence_length": 128, "data.align": 8, "train.batch_size": 16},
  answers={
    "data.source": "task",
    "data.task.name": "modular_arithmetic",
    "data.task.length": 3,
    "data.sequence_length": 0,
    "thought.placement": "answer",
    "train.batch_size": 64,
  },
)
"""Small runs to try a recipe on. text: a decoder of bytes on the embedded corpus. answers: modular arithmetic, with the
thought between the question and the answer."""


POD = {
  "data.source": "arrayrecord",
  "data.input": "corpus",
  "data.tokenizer": "sentencepiece:tokenizer.model",
  "data.align": 64,
  "model.vocabulary_multiple": 1024,
  "model.compute_dtype": "bfloat16",
  "model.remat": "full",
  "thought.placement": "stride",
  "thought.stride": 64,
}
"""What the files of configs/pod have in common: a prepared corpus, bfloat16, layers computed again, sparse thoughts."""


def pod(config):
  """Sets POD in `config`, a ConfigDict, and returns it; sizes, mesh and a recipe come on top."""
  config.update_from_flattened_dict(POD)
  return config


def start(config, name: str):
  """A run of one of STARTS in `config`, minutes on two cores, and returns it; a recipe comes on top."""
  config.update_from_flattened_dict(pick(STARTS, name, "start"))
  config.model.width = 128
  config.train.steps = 400
  config.train.log_every = 20
  config.checkpoint.every = 200
  config.optimizer.learning_rate = 2e-3
  config.optimizer.schedule = "wsd"
  config.optimizer.warmup_steps = 40
  return config
