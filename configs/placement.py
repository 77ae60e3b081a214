"""Where to think, at about equal numbers of thoughts: S3 word problem, thoughts after half of 16 elements.

Purpose: does it matter where eight latent thoughts stand? Recipes: none; every (16 thoughts, what can be had); stride
(every second element); entropy (where the model itself is unsure of the next label); proxy (where a frozen model
without thoughts is); router (a head decides at each element, private thoughts, since only those are routed).
Command: python -m thinking_lm.frontier --config=configs/placement.py --root=runs/placement --seeds=3 none every \
  stride entropy 'proxy,thought.proxy=runs/placement/none-{seed}' router
(none comes first: it is the proxy; --config.thought.need_above is what `thinking_lm.calibrate` says of it.) Beside the
router, whose thoughts are private, belong the others with thought.topology=private, and itself at half of the
elements: python -m thinking_lm.calibrate --workdir=runs/placement/router-0 prints the VALUE for
python -m thinking_lm.evaluate --workdir=runs/placement/router-0 --split=test --thought=stop_at=VALUE
Measured: see "Where to think" in BUILD_NOTES.md.
"""

from thinking_lm import experiment, recipes

LENGTH = 16
ABOVE = 1.5
"""Nats of entropy above which to think: about half of the elements, by a model without thoughts."""

PLACEMENTS = dict(
  every={"thought.placement": "every"},
  stride={"thought.placement": "stride", "thought.stride": 2},
  entropy={"thought.placement": "entropy", "thought.need_above": ABOVE, "thought.room": LENGTH // 2},
  router={
    "thought.placement": "every",
    "thought.topology": "private",
    "thought.halting": "router",
    "objective.halt_weight": 0.03,  # not shown to be better than 0: BUILD_NOTES.md
    "objective.halt_prior": 0.5,
  },
)
PLACEMENTS["proxy"] = PLACEMENTS["entropy"]


def get_config(recipe="stride"):
  """One layer of width 64, a latent thought of one token; other recipes than the above think every second time."""
  config = experiment.default_config()
  config.data.source = "task"
  config.data.task.name = "word_problem"
  config.data.task.group = "S3"
  config.data.task.length = LENGTH
  config.data.sequence_length = 0
  config.model.layers = 1
  config.model.width = 64
  config.train.steps = 600
  config.train.batch_size = 128
  config.train.log_every = 100
  config.checkpoint.every = 600
  config.optimizer.learning_rate = 2e-3
  config.optimizer.schedule = "wsd"
  config.optimizer.warmup_steps = 100
  config.optimizer.weight_decay = 0.0
  if recipe not in PLACEMENTS:
    config.thought.placement, config.thought.stride = "stride", 2
    return recipes.apply(config, recipe)
  recipes.apply(config, "latent")
  config.update_from_flattened_dict(PLACEMENTS[recipe])
  return config
