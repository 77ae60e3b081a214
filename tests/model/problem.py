"""The tiny problem on which the rollout is compared with the oracle: rows of every placement, stacked in one batch."""

import collections
import functools

import jax
import numpy as np

from tests import oracles
from thinking_lm.model.decoder import Model, ModelConfig
from thinking_lm.model.rollout import rollout
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Batch, Layout, Vocabulary

T, V = 8, 6
VOCABULARY = Vocabulary(V, 5, np.ones(V, np.int32), np.array([0, 1, 2, 3, 0, 0], np.int8))

TIED = ModelConfig(layers=2, width=8, heads=2, kv_heads=1, mlp_width=12)
UNTIED = ModelConfig(
  **dict(layers=2, width=8, heads=4, kv_heads=2, head_width=4, mlp_width=12, qk_norm=True, tie_embeddings=False),
  **dict(logit_cap=3.0, latent_map="linear", rope_base=100.0),
)

ROWS = (
  # placement, its options, document lengths (a negative one is padding, and so is the rest of the row)
  ("every", {}, (3, 5)),
  ("stride", dict(stride=2), (5, 2)),
  ("sentence", dict(cap=1), (4, 3)),
  ("explicit", dict(positions=(0, 3)), (1, -1, 6)),
  ("every", {}, (6,)),
)
TOKENS = np.array(
  [
    [0, 1, 2, 3, 4, 5, 0, 1],
    [4, 4, 0, 2, 5, 1, 3, 0],
    [0, 1, 2, 1, 2, 3, 1, 0],
    [2, 0, 3, 4, 1, 5, 5, 0],
    [5, 3, 1, 0, 2, 4, 0, 0],
  ],
  np.int32,
)


def pack(tokens_BT, lengths, seed=0) -> Batch:
  """A batch of rows with documents of these lengths; targets and weights are random, to tell every one apart.

  A negative length is padding before the next document.
  """
  rng = np.random.default_rng(seed)
  B, T = np.shape(tokens_BT)
  segments_BT, positions_BT = np.zeros((2, B, T), np.int32)
  for b, row in enumerate(lengths):
    start = 0
    for number, length in enumerate(row):
      if length > 0:
        segments_BT[b, start : start + length] = number + 1
        positions_BT[b, start : start + length] = np.arange(length)
      start += abs(length)
  weights_BT = (rng.choice([0.0, 0.5, 1.0, 2.0], (B, T)) * (segments_BT > 0)).astype(np.float32)
  targets_BT = rng.integers(0, V, (B, T)).astype(np.int32)
  ids_B = np.array([7, 3, 2**31 + 5, 0, 11, *range(100, 100 + B)], np.uint32)[:B]
  return Batch(np.asarray(tokens_BT, np.int32), targets_BT, weights_BT, segments_BT, positions_BT, ids_B)


BATCH = pack(TOKENS, [lengths for _, _, lengths in ROWS])


def marks(batch: Batch, b: int, placement: str, options) -> list[int]:
  """Where row b is thought about, spelled out."""
  found, of_document = [], collections.Counter()
  for t in range(batch.tokens_BT.shape[1]):
    position = batch.positions_BT[b, t]
    kind = VOCABULARY.sentence_V[batch.tokens_BT[b, t]]
    after_stop = position > 0 and VOCABULARY.sentence_V[batch.tokens_BT[b, t - 1]] == 1
    wanted = dict(
      none=False,
      every=True,
      stride=(position + 1) % options.get("stride", 8) == 0,
      sentence=kind == 3 or (kind == 2 and after_stop),
      explicit=position in options.get("positions", ()),
    )
    document = int(batch.segments_BT[b, t])
    of_document[document] += wanted[placement]
    if wanted[placement] and document and of_document[document] <= (options.get("cap") or 99):
      found.append(t)
  return found[: options.get("room") or None]


ANCHORS = [marks(BATCH, b, placement, options) for b, (placement, options, _) in enumerate(ROWS)]


def layout(anchors=ANCHORS, block=2, T=T) -> Layout:
  """Any rows' anchors in one layout: blocks of `block` tokens, as many as could ever be needed."""
  most = max(map(len, anchors))
  filled = [row + [T] * (most - len(row)) for row in anchors]
  return Layout(np.array(filled, np.int32).reshape(len(anchors), most), block=block, blocks=T)


@functools.cache
def model(config=TIED) -> Model:
  return Model(config, V)


def moved(model: Model, by: float, seed=0):
  """Parameters with every leaf moved off its initial value, so that no scale is 1 and no map the identity."""
  leaves, tree = jax.tree.flatten(jax.jit(model.init)(jax.random.key(seed)))
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(tree, [leaf + by * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


@functools.cache
def params(config=TIED):
  return moved(model(config), 0.25)


KEY = jax.random.key(42)


def outputs(trace, thought: ThoughtConfig) -> dict:
  """What of a trace is compared, under the oracle's names."""
  found = dict(logp=trace.logp_BGT, outcome=trace.outcome_BGN, policy=trace.policy_logp_BGN, entropy=trace.entropy_BGN)
  if thought.topology == "private" and thought.length:
    found["base"] = trace.base_logp_BT
    if thought.lookahead > 1:
      found["ahead"] = trace.ahead_logp_BGNA
  return found


def weighted(found: dict, cotangents: dict):
  """One number that every output has its own weight in."""
  return sum((found[name] * cotangents[name]).sum() for name in found)


def relative(left, right) -> float:
  """The L2 norm of the difference of two trees over that of the second."""
  flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)
  return np.linalg.norm(flat(left) - flat(right)) / np.linalg.norm(flat(right))


@functools.cache
def compiled(config: ModelConfig, thought: ThoughtConfig, given=False):
  """Jitted (params, batch, layout, cotangents[, thoughts]) -> ((number, trace), gradient)."""

  def loss(params, batch, layout, cotangents, thoughts=None):
    trace = rollout(model(config), thought, params, batch, layout, KEY, thoughts)
    return weighted(outputs(trace, thought), cotangents), trace

  del given  # another key of the cache, for another signature
  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def cotangents(thought: ThoughtConfig, batch=BATCH, anchors=ANCHORS, seed=1) -> dict:
  """Random weights for every output, 0 at padding and at anchors that do not exist."""
  rng = np.random.default_rng(seed)
  B, T = batch.tokens_BT.shape
  G, N = (thought.samples, max(map(len, anchors))) if thought.length else (1, 0)
  real_BT = batch.segments_BT > 0
  valid_BN = np.array([[n < len(row) for n in range(N)] for row in anchors]).reshape(B, N)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  found = dict(logp=draw(B, G, T) * real_BT[:, None])
  for name in ("outcome", "policy", "entropy"):
    found[name] = draw(B, G, N) * valid_BN[:, None]
  if thought.topology == "private" and thought.length:
    found["base"] = draw(B, T) * real_BT
    if thought.lookahead > 1:
      found["ahead"] = draw(B, G, N, thought.lookahead - 1) * inside(batch, anchors, thought.lookahead, N)[:, None]
  return found


def inside(batch, anchors, lookahead, N):
  """[B, N, lookahead - 1]: the look-ahead token exists and belongs to the anchor's document."""
  B, T = batch.tokens_BT.shape
  found = np.zeros((B, N, lookahead - 1))
  for b, row in enumerate(anchors):
    for n, a in enumerate(row):
      for m in range(1, lookahead):
        found[b, n, m - 1] = a + m < T and batch.segments_BT[b, a + m] == batch.segments_BT[b, a]
  return found


def oracle(config: ModelConfig, thought: ThoughtConfig, params, tokens, noise, batch=BATCH, anchors=ANCHORS) -> dict:
  """The oracle's outputs as {(name, index): value}, without what does not exist. Call it in float64.

  tokens[b][g][n], noise[b][g][n]: the think tokens and the Gumbel noise that the rollout drew.
  """
  private = thought.topology == "private" and thought.length > 0
  found = {}
  for b in range(batch.tokens_BT.shape[0]):
    pieces = (batch.tokens_BT, batch.targets_BT, batch.weights_BT, batch.segments_BT, batch.positions_BT)
    row = oracles.Row(*(piece[b].tolist() for piece in pieces), anchors[b] if thought.length else [])
    for g in range(thought.samples if thought.length else 1):
      function = oracles.private if private else oracles.persistent
      one = function(params, config, thought, V, row, tokens[b][g], noise[b][g])
      found |= {(name, (b, g, t)): one[name][t] for name in ("logp", "hit") for t in range(len(row.tokens))}
      names = ("outcome", "policy", "entropy", "inputs", "tokens")
      found |= {(name, (b, g, n)): one[name][n] for name in names for n in range(len(row.anchors))}
      if private:
        found |= {("base", (b, t)): one["base"][t] for t in range(len(row.tokens))}
        count = range(thought.lookahead - 1)
        found |= {("ahead", (b, g, n, m)): one["ahead"][n][m] for n in range(len(row.anchors)) for m in count}
  return {place: value for place, value in found.items() if value is not None}
