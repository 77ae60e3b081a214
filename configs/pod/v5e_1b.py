"""1.3 B parameters on one v5e-256 pod (16 x 16 chips).

Purpose: the smallest pod that a thinking model is compared on.
Plan: python -m thinking_lm.plan --config=configs/pod/v5e_1b.py:RECIPE --topology=v5e:16x16
Command, on every host: python -m thinking_lm.train --config=configs/pod/v5e_1b.py:RECIPE --workdir=gs://B/RUN \
  --config.data.input=gs://B/corpus --config.data.tokenizer=sentencepiece:PATH
Recipes: none, latent (persistent, n = 4), hybrid (private, n = 16, G = 4).
Measured: never trained. Training step compiled at XLA O1 by libtpu 0.0.42.1, code of 68e78f3, GiB a device of 15.75 and
  the roofline's best seconds: none 0.80, 0.12 s; latent 8.83, 0.27 s (memory: weights once a call); hybrid
  3.25, 0.31 s (memory: attention scores).
Thoughts stand after every 64th token: a serial thought reads all weights once for each of its tokens, so that
closer ones leave the chips waiting for memory. For the same reason latent splits the weights over `tensor` before
`fsdp`: what fsdp splits is gathered once a segment of the stream, and then every chip reads all of it for each token.
"""

from thinking_lm import experiment, recipes

THOUGHTS = dict(
  latent={"thought.length": 4, "mesh.fsdp": 32, "mesh.tensor": 8},
  hybrid={"thought.length": 16, "thought.topology": "private", "thought.lookahead": 4},
)


def get_config(recipe="none"):
  """20 layers of width 2048 on rows of 2048 tokens, 0.5 M real tokens a step."""
  config = recipes.pod(experiment.default_config())
  config.data.vocabulary_size = 32000
  config.data.sequence_length = 2048
  config.model.layers = 20
  config.model.width = 2048
  config.model.heads = 16
  config.model.kv_heads = 8
  config.model.mlp_width = 8192
  config.model.rope_base = 10_000.0
  config.model.tie_embeddings = True
  config.train.steps = 50_000
  config.train.batch_size = 256
  config.train.distributed = True
  config.optimizer.learning_rate = 3e-4
  config.optimizer.warmup_steps = 2000
  config.checkpoint.every = 500
  config.mesh.data = 1
  config.mesh.fsdp = 256
  config.mesh.tensor = 1
  recipes.apply(config, recipe)
  config.update_from_flattened_dict(THOUGHTS.get(recipe, {}))
  return config
