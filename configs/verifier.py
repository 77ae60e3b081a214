"""A generative verifier of answers to modular arithmetic (GenRM, arXiv:2408.15240), with or without thoughts.

Purpose: is a verdict better after thinking, and which gradient teaches the thought? Recipes: none is the direct
Yes/No verifier; pause, latent, hybrid, ... think once, before the verdict (thought.placement answer); written learns
to write a program's rationale as text (their CoT variant); thinking goes on from that, its rationale now a sampled
thought in the very place of the text, by both gradients; discriminative is their control, a scalar head on the last
state with binary cross-entropy (a thought before it is one option more).
Command:
  python -m thinking_lm.train --config=configs/verifier.py:solver --workdir=runs/solver
  python -m thinking_lm.candidates --workdir=runs/solver --balance --problems=4000 --output=runs/v.jsonl
  python -m thinking_lm.candidates --workdir=runs/solver --split=test --problems=200 --output=runs/test.jsonl
  python -m thinking_lm.train --config=configs/verifier.py:written --workdir=runs/written \
    --config.data.input=runs/v.jsonl
  python -m thinking_lm.train --config=configs/verifier.py:thinking --workdir=runs/thinking \
    --config.data.input=runs/v.jsonl --config.train.init_from=runs/written
  python -m thinking_lm.verify --workdir=runs/thinking --candidates=runs/test.jsonl --rationales=8
Departs from the paper: trained from scratch at a width of 128, on bytes; --config.data.verdicts.solutions=0.3 mixes in
solutions (their lambda); thinking has no counterpart there.
Measured: see "Verifiers" in BUILD_NOTES.md.
"""

from thinking_lm import experiment, recipes

RATIONALE = 16
"""Bytes of the longest rationale of three operands modulo 10: `3, +9 2, *2 4: 4`."""


def get_config(recipe="none"):
  """Two layers of width 128. `solver` trains the model whose answers are judged."""
  config = experiment.default_config()
  config.data.sequence_length = 0
  config.model.layers = 2
  config.model.width = 128
  config.thought.placement = "answer"
  config.train.steps = 600
  config.train.batch_size = 64
  config.train.log_every = 50
  config.checkpoint.every = 300
  config.optimizer.learning_rate = 2e-3
  config.optimizer.schedule = "wsd"
  config.optimizer.warmup_steps = 50
  if recipe == "solver":
    config.data.source = "task"
    config.data.task.name = "modular_arithmetic"
    config.data.task.length = 3
    return config
  config.data.source = "verdicts"
  config.data.verdicts.label = recipe == "discriminative"
  config.data.verdicts.rationale = recipe == "written"
  config.data.verdicts.instead = recipe == "thinking"
  if recipe == "written":
    config.data.verdicts.padded = RATIONALE
  recipes.apply(config, dict(discriminative="none", written="none", thinking="hybrid").get(recipe, recipe))
  if recipe == "thinking":
    config.thought.length = RATIONALE
    config.thought.rotary = "advance"
    config.train.steps = 200
    config.optimizer.learning_rate = 3e-4
  return config
