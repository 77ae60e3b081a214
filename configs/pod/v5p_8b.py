"""8 B parameters on 512 v5p chips (8 x 8 x 8; "v5p-1024" counts cores).

Purpose: a model of the size that is mostly published.
Plan: python -m thinking_lm.plan --config=configs/pod/v5p_8b.py:RECIPE --topology=v5p:8x8x8
Command, on every host: python -m thinking_lm.train --config=configs/pod/v5p_8b.py:RECIPE --workdir=gs://B/RUN \
  --config.data.input=gs://B/corpus --config.data.tokenizer=sentencepiece:PATH
Recipes: none, latent (persistent, n = 4), hybrid (private, n = 16, G = 4).
Measured: never trained. Training step compiled at XLA O1 by libtpu 0.0.42.1, code of 68e78f3, GiB a device of 95.74 and
  the roofline's best seconds: none 5.53, 1.16 s; latent, in four micro-batches, 40.54, 2.62 s (in eight 22.00, 4.57 s,
  code of d071e90: each reads all weights again); hybrid 21.22, 2.54 s.
Thoughts stand after every 64th token: a serial thought reads all weights once for each of its tokens, so that
closer ones leave the chips waiting for memory. For the same reason latent splits the weights over `tensor` before
`fsdp`: what fsdp splits is gathered once a segment of the stream, and then every chip reads all of it for each token.
"""

from thinking_lm import experiment, recipes

THOUGHTS = dict(
  latent={"thought.length": 4, "mesh.fsdp": 64, "mesh.tensor": 8, "train.accumulation": 4},
  hybrid={"thought.length": 16, "thought.topology": "private", "thought.lookahead": 4},
)


def get_config(recipe="none"):
  """32 layers of width 4096 on rows of 4096 tokens, 4.2 M real tokens a step."""
  config = recipes.pod(experiment.default_config())
  config.data.vocabulary_size = 128000
  config.data.sequence_length = 4096
  config.model.layers = 32
  config.model.width = 4096
  config.model.heads = 32
  config.model.kv_heads = 8
  config.model.mlp_width = 14336
  config.model.rope_base = 500_000.0
  config.model.tie_embeddings = False
  config.train.steps = 100_000
  config.train.batch_size = 1024
  config.train.distributed = True
  config.optimizer.learning_rate = 3e-4
  config.optimizer.warmup_steps = 2000
  config.checkpoint.every = 500
  config.mesh.data = 1
  config.mesh.fsdp = 512
  config.mesh.tensor = 1
  recipes.apply(config, recipe)
  config.update_from_flattened_dict(THOUGHTS.get(recipe, {}))
  return config
