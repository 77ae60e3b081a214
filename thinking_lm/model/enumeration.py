"""The rollout of every thought, where these are few enough: their Trace, from which expectations follow exactly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from thinking_lm.model.decoder import Model
from thinking_lm.model.rollout import rollout
from thinking_lm.thoughts import enumeration
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Batch, Layout, Params, Thoughts, Trace

CHUNK = 64
"""Thoughts that go through the model at once; the backward pass runs each such pass again."""


def rollout_every(
  model: Model, config: ThoughtConfig, params: Params, batch: Batch, layout: Layout, key, chunk: int = CHUNK
) -> Trace:
  """The Trace whose G samples are all thoughts (`thoughts.enumeration.every`), each once; nothing is drawn.

  Their policy_logp_BGN are their log-probabilities. Differentiable in everything; thoughts.inputs_BGNJD is left empty.
  """
  B, N = layout.anchors_BN.shape
  if not N:  # rows too short for a single thought
    return rollout(model, config, params, batch, layout, key)
  tokens_ZNn = enumeration.every(config, model.vocabulary_size, model.bind(params).stop, N)
  Z = len(tokens_ZNn)
  parts = -(-Z // chunk)
  size = -(-Z // parts)
  filled = np.concatenate([tokens_ZNn, np.repeat(tokens_ZNn[:1], parts * size - Z, axis=0)])
  few = dataclasses.replace(config, samples=size)

  def part(tokens_GNn):
    tokens_BGNJ = jnp.broadcast_to(tokens_GNn, (B, *tokens_GNn.shape))
    given = Thoughts(model.bind(params).embed(tokens_BGNJ), tokens_BGNJ)
    trace = rollout(model, few, params, batch, layout, key, given)
    return trace.replace(thoughts=Thoughts(trace.thoughts.inputs_BGNJD[..., :0], trace.thoughts.tokens_BGNJ))

  if parts == 1:
    return part(jnp.asarray(filled))
  traces = jax.lax.map(jax.checkpoint(part), jnp.asarray(filled.reshape(parts, size, N, -1)))

  def join(path, leaf):  # names carry axes: what has no G is the same in every part
    if "_BG" not in path[-1].name:
      return leaf[0]
    return jnp.moveaxis(leaf, 0, 1).reshape(B, parts * size, *leaf.shape[3:])[:, :Z]

  return jax.tree_util.tree_map_with_path(join, traces)
