"""Where to think while reading prose, at about equal numbers of thoughts: sentence ends, or elsewhere.

Purpose: does a reader of a textbook gain by pausing where a sentence ends? A latent thought after each sentence end of
the embedded corpus (one in 147 bytes), against as many at regular places, where the model itself is unsure, where a
frozen one without thoughts is, and where a router says. Recipes: none, sentence, stride, entropy, proxy, router.
Command: python -m thinking_lm.frontier --config=configs/reading.py --root=runs/reading --seeds=3 none \
  sentence,thought.topology=private stride,thought.topology=private entropy,thought.topology=private \
  'proxy,thought.topology=private,thought.proxy=runs/reading/none-{seed}' router
(none comes first: it is the proxy; thought.need_above is about what `thinking_lm.calibrate --shares=0.0068` says of
it.) The router is compared at as many thoughts: python -m thinking_lm.calibrate --workdir=runs/reading/router-0 \
  --shares=0.0068 prints the VALUE for python -m thinking_lm.evaluate --workdir=runs/reading/router-0 --split=test \
  --thought=stop_at=VALUE
Only private thoughts, which the next byte alone sees, are routed. Without thought.topology=private the others stay in
the context, which was not run: ten minutes a run on one core.
Measured: see "Where to think while reading" in BUILD_NOTES.md.
"""

from thinking_lm import experiment, recipes

SHARE = 0.0068
"""Sentence ends a byte of the training split."""
ABOVE = 3.65
"""Nats of entropy above which about this share of the bytes is, by a model without thoughts (seed 10)."""

PLACEMENTS = dict(
  sentence={"thought.placement": "sentence", "thought.room": 8},
  stride={"thought.placement": "stride", "thought.stride": round(1 / SHARE)},
  entropy={"thought.placement": "entropy", "thought.need_above": ABOVE, "thought.room": 12},
  router={
    "thought.placement": "every",
    "thought.topology": "private",
    "thought.halting": "router",
    "objective.halt_weight": 0.03,
    "objective.halt_prior": 1 - SHARE,
  },
)
PLACEMENTS["proxy"] = PLACEMENTS["entropy"]


def get_config(recipe="sentence"):
  """Two layers of width 128 on rows of 512 bytes, a latent thought of one token."""
  config = experiment.default_config()
  config.data.source = "default"
  config.data.sequence_length = 512
  config.model.layers = 2
  config.model.width = 128
  config.train.steps = 400
  config.train.batch_size = 4
  config.train.log_every = 50
  config.checkpoint.every = 400
  config.optimizer.learning_rate = 3e-3
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 40
  if recipe not in PLACEMENTS:
    return recipes.apply(config, recipe)
  recipes.apply(config, "latent")
  config.update_from_flattened_dict(PLACEMENTS[recipe])
  return config
