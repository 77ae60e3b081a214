"""0.02 B parameters on four v5e chips (2 x 2).

Purpose: a pod that compiles in a minute, so that every change can be held to its budget (`make plan-small`); it is not
meant to be trained.
Plan: python -m thinking_lm.plan --config=configs/pod/v5e_0.02b.py:RECIPE --topology=v5e:2x2
Recipes: all; the budget (small.json) is of latent.
"""

from thinking_lm import experiment, recipes


def get_config(recipe="none"):
  """2 layers of width 512 on rows of 256 tokens."""
  config = recipes.pod(experiment.default_config())
  config.data.vocabulary_size = 32000
  config.data.sequence_length = 256
  config.model.layers = 2
  config.model.width = 512
  config.model.heads = 4
  config.model.kv_heads = 2
  config.model.mlp_width = 2048
  config.train.batch_size = 8
  config.mesh.data = 1
  config.mesh.fsdp = 2
  config.mesh.tensor = 2
  return recipes.apply(config, recipe)
