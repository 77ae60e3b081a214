"""70 B parameters on 1024 v5p chips (8 x 8 x 16).

Purpose: the largest model that fits a thought beside its optimizer.
Plan: python -m thinking_lm.plan --config=configs/pod/v5p_70b.py:RECIPE --topology=v5p:8x8x16
Command, on every host: python -m thinking_lm.train --config=configs/pod/v5p_70b.py:RECIPE --workdir=gs://B/RUN \
  --config.data.input=gs://B/corpus --config.data.tokenizer=sentencepiece:PATH
Recipes: none, latent (persistent, n = 4), hybrid (private, n = 16, G = 4).
Measured: never trained. Training step compiled at XLA O1 by libtpu 0.0.42.1, code of 68e78f3, GiB a device of 95.74 and
  the roofline's best seconds: none 46.95, 5.01 s; latent, in eight micro-batches, 69.14, 39.67 s; hybrid, in two
  micro-batches, 59.67, 10.97 s (in one 108.8 GiB, code of 2a47d05: `plan --fit` found the two).
Thoughts stand after every 64th token: a serial thought reads all weights once for each of its tokens, so that
closer ones leave the chips waiting for memory. For the same reason latent splits the weights over `tensor` before
`fsdp`: what fsdp splits is gathered once a segment of the stream, and then every chip reads all of it for each token.
"""

from thinking_lm import experiment, recipes

THOUGHTS = dict(
  latent={"thought.length": 4, "mesh.fsdp": 128, "mesh.tensor": 8, "train.accumulation": 8},
  hybrid={"thought.length": 16, "thought.topology": "private", "thought.lookahead": 4, "train.accumulation": 2},
)


def get_config(recipe="none"):
  """80 layers of width 8192 on rows of 4096 tokens, 4.2 M real tokens a step."""
  config = recipes.pod(experiment.default_config())
  config.data.vocabulary_size = 128000
  config.data.sequence_length = 4096
  config.model.layers = 80
  config.model.width = 8192
  config.model.heads = 64
  config.model.kv_heads = 8
  config.model.mlp_width = 28672
  config.model.rope_base = 500_000.0
  config.model.tie_embeddings = False
  config.train.steps = 200_000
  config.train.batch_size = 1024
  config.train.distributed = True
  config.optimizer.learning_rate = 1.5e-4
  config.optimizer.warmup_steps = 2000
  config.checkpoint.every = 500
  config.mesh.data = 1
  config.mesh.fsdp = 128
  config.mesh.tensor = 8
  recipes.apply(config, recipe)
  config.update_from_flattened_dict(THOUGHTS.get(recipe, {}))
  return config
