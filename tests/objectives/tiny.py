"""A real decoder whose every thought can be enumerated: one packed row, three anchors, one of 3 tokens at each."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from tests.model import problem
from thinking_lm.model.decoder import Model, ModelConfig
from thinking_lm.model.rollout import rollout
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Batch, Layout, Thoughts

V = 3
TOKENS, TARGETS = np.array([2, 0, 1, 0, 2, 1, 0]), np.array([0, 1, 0, 2, 1, 0, 0])
SEGMENTS, POSITIONS = np.array([1, 1, 1, 1, 2, 2, 0]), np.array([0, 1, 2, 3, 0, 1, 0])
WEIGHTS = np.array([1, 1, 0, 1, 1, 1, 0], np.float32)
ANCHORS = (1, 3, 4)
LOOKAHEAD = dict(persistent=0, private=2)
EVERY = np.array(list(itertools.product(range(V), repeat=len(ANCHORS))))
"""All thoughts of the row, [27, N]: fed as the G samples of one rollout."""

MODEL = Model(ModelConfig(layers=1, width=8, heads=2, kv_heads=1, mlp_width=8), V)


def thought(topology) -> ThoughtConfig:
  return ThoughtConfig(
    rotary="advance",
    **dict(kind="sampled", length=1, placement="explicit", positions=(0,), samples=len(EVERY)),
    **dict(topology=topology, lookahead=LOOKAHEAD[topology]),
  )


@functools.cache
def params():
  return problem.moved(MODEL, 0.5)


def run(topology, params):
  """The trace of all thoughts side by side, differentiable in everything but the choice of tokens."""
  row = lambda a, dtype=np.int32: jnp.asarray(np.asarray(a, dtype)[None])
  batch = Batch(row(TOKENS), row(TARGETS), row(WEIGHTS, np.float32), row(SEGMENTS), row(POSITIONS), row(5, np.uint32))
  # One anchor more, that does not exist.
  layout = Layout(row([*ANCHORS, len(TOKENS)]), block=len(TOKENS), blocks=len(ANCHORS) + 1)
  tokens_BGNJ = jnp.asarray(np.pad(EVERY, [(0, 0), (0, 1)]))[None, :, :, None]
  given = Thoughts(MODEL.bind(params).embed(tokens_BGNJ), tokens_BGNJ)
  return rollout(MODEL, thought(topology), params, batch, layout, jax.random.key(0), given)


@functools.cache
def rolled(topology):
  """The trace as numpy."""
  return jax.tree.map(np.asarray, jax.jit(functools.partial(run, topology))(params()))


def outcome_of(topology, anchor) -> list[int]:
  """The targets of the thought at an anchor."""
  reach = LOOKAHEAD[topology] or len(TOKENS)
  return [t for t in range(anchor, min(anchor + reach, len(TOKENS))) if SEGMENTS[t] == SEGMENTS[anchor]]
