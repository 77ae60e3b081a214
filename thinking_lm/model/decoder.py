"""The decoder: a pre-norm transformer whose one call serves training, thinking and cached decoding.

A call runs P parallel streams of Q queries each. All streams may share a set of past keys (a prefix, a cache) and each
may have keys of its own (a private thought so far); a plain forward pass is the case P = 1 without either.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from thinking_lm.config import option, pick
from thinking_lm.model.attention import BACKENDS, CHUNK, MASKED, Filled, Keys, attention
from thinking_lm.model.heads import HEADS
from thinking_lm.model.layers import MATMUL, RMSNorm, matmul, parameter, product, rotary, rotate
from thinking_lm.sharding import constrain, rows_of_columns
from thinking_lm.types import Params

REMAT = dict(
  none=lambda layer: layer,
  dots=lambda layer: jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(MATMUL)),
  full=jax.checkpoint,
)
"""What the backward pass keeps of a layer: everything, matrix products with weights, or only the layer's input."""

ACTIVATIONS = ("batch", "streams", "length", None)
"""Logical axes of x_BPQD."""

DTYPES = dict(float32=jnp.float32, bfloat16=jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes and variants of the decoder. Parameters are float32 always."""

  layers: int = option(2, "number of layers", low=1)
  width: int = option(128, "width D of the residual stream", low=2)
  heads: int = option(4, "query heads H", low=1)
  kv_heads: int = option(0, "key-value heads K (grouped-query attention when fewer than heads); 0 means heads", low=0)
  head_width: int = option(0, "width E of a head; 0 means width / heads", low=0)
  mlp_width: int = option(0, "width F of the SwiGLU MLP; 0 means 8/3 width, rounded up to a multiple of 32", low=0)
  qk_norm: bool = option(False, "RMSNorm on queries and keys of each head (arXiv:2302.05442)")
  rope_base: float = option(10_000.0, "base of the rotary positions", above=1)
  tie_embeddings: bool = option(True, "read out with the embedding table")
  logit_cap: float = option(0.0, "soft cap c tanh(logits / c); 0 is off (Gemma 2, arXiv:2408.00118)", low=0)
  latent_map: str = option(
    "identity",
    "what a latent thought does to the normalised last hidden state before it is fed back",
    choices=("identity", "linear"),
  )
  compute_dtype: str = option("float32", "type of activations and matrix products", choices=DTYPES)
  attention: str = option(
    "auto",
    "how attention is computed (auto: einsum, all scores at once, while no set of keys is larger than attention_chunk, "
    "chunked beyond), of every call of the decoder over many slots and of the backward pass of private drawn "
    "thoughts; drawing these slot by slot and training serial persistent streams have products of their own, and "
    "decoding goes by blocks of its cache",
    choices=BACKENDS,
  )
  attention_chunk: int = option(CHUNK, "keys that attention by chunks scores at a time", low=1)
  query_blocks: int = option(1, "attention in so many blocks of queries, which skip the keys after them", low=1)
  unroll: int = option(1, "layers of one loop body: more are faster on a CPU without remat, and compile longer", low=1)
  remat: str = option(
    "none",
    "what the backward pass of a pass over many slots recomputes; serial persistent streams and private thoughts that "
    "are scored as they are drawn have a backward pass of their own, which it does not change",
    choices=REMAT,
  )
  vocabulary_multiple: int = option(1, "rows of the embedding table are rounded up to a multiple of this", low=1)

  def faults(self) -> list[str]:
    """Rules across fields."""
    found = []
    if self.head_width == 0 and self.width % self.heads:
      found.append(f"width {self.width} does not divide into {self.heads} heads; set head_width or change either")
    if self.heads % self.resolved_kv_heads:
      found.append(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
    if self.resolved_head_width % 2:
      found.append(f"a head must have an even width for rotary positions, got {self.resolved_head_width}")
    if self.attention == "cudnn" and (self.compute_dtype != "bfloat16" or self.resolved_head_width % 8):
      found.append(
        "attention 'cudnn' needs compute_dtype 'bfloat16' and heads of a width that 8 divides, got "
        f"{self.compute_dtype!r} and {self.resolved_head_width}"
      )
    return found

  def backend_faults(self, platform: str) -> list[str]:
    """A backend of attention that JAX's platform, of these devices, does not run."""
    wanted = BACKENDS[self.attention].platform
    if wanted in (None, platform):
      return []
    here = ", ".join(name for name, backend in BACKENDS.items() if backend.platform in (None, platform))
    return [f"config.model.attention {self.attention!r} runs on {wanted} only, this job has {platform}: use {here}"]

  def runnable(self, platform: str) -> "ModelConfig":
    """The config, with attention by chunks where its own backend does not run: the same numbers to rounding."""
    return dataclasses.replace(self, attention="chunked") if self.backend_faults(platform) else self

  @property
  def resolved_head_width(self) -> int:
    """E."""
    return self.head_width or self.width // self.heads

  @property
  def resolved_kv_heads(self) -> int:
    """K."""
    return self.kv_heads or self.heads

  @property
  def resolved_mlp_width(self) -> int:
    """F."""
    return self.mlp_width or -(-self.width * 8 // 3 // 32) * 32


class Cache(NamedTuple):
  """Keys and values of all layers: [L, B, S, K, E] when shared by the streams, [L, B, P, S, K, E] when their own."""

  k: jax.Array
  v: jax.Array


class Seen(NamedTuple):
  """Cached keys that a call may look at. mask_BPQS: bool, broadcast over B, P and Q.

  count: of a cache with room left, how many slots are read (traced). It is in C blocks then, heads before streams:
  [L, C, B, K, S / C, E] when shared, [L, C, B, K, P, S / C, E] when their own.
  """

  cache: Cache
  mask_BPQS: jax.Array
  count: jax.Array | None = None


class Layer(nnx.Module):
  """x + attention(norm(x)), then x + SwiGLU(norm(x))."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.config = config
    D, F, E = config.width, config.resolved_mlp_width, config.resolved_head_width
    H, K = config.heads, config.resolved_kv_heads
    out_scale = (2 * config.layers) ** -0.5
    self.attention_norm = RMSNorm(D, "embed")
    self.query = parameter(rngs, (D, H * E), ("embed", "heads"), D**-0.5)
    self.key = parameter(rngs, (D, K * E), ("embed", "kv_heads"), D**-0.5)
    self.value = parameter(rngs, (D, K * E), ("embed", "kv_heads"), D**-0.5)
    self.out = parameter(rngs, (H * E, D), ("heads", "embed"), (H * E) ** -0.5 * out_scale)
    self.mlp_norm = RMSNorm(D, "embed")
    self.gate = parameter(rngs, (D, F), ("embed", "mlp"), D**-0.5)
    self.up = parameter(rngs, (D, F), ("embed", "mlp"), D**-0.5)
    self.down = parameter(rngs, (F, D), ("mlp", "embed"), F**-0.5 * out_scale)
    if config.qk_norm:
      self.query_norm = RMSNorm(E, None)
      self.key_norm = RMSNorm(E, None)

  def __call__(self, x_BPQD, turn, mask_BPQQ, seen: Sequence[Keys]):
    """Returns (x_BPQD, (k_BPQKE, v_BPQKE)): the new activations and this call's own keys and values; turn: as below."""
    q, k, v = self.project(x_BPQD, turn)
    c = self.config
    mixed = attention(q, [*seen, Keys(k, v, mask_BPQQ)], c.attention, c.query_blocks, c.attention_chunk)
    return self.complete(x_BPQD, mixed), (k, v)

  def product(self, name: str, x):
    """x times the matrix `name`. The two halves below take another function of this signature in its place."""
    return matmul(x, getattr(self, name)[...])

  def turn(self, positions):
    """How far queries and keys at positions [...] are turned: computed once for all layers."""
    return rotary(positions, self.config.resolved_head_width, self.config.rope_base)

  def project(self, x_XD, turn, product=None):
    """What comes before attention: queries [..., H, E], keys and values [..., K, E] of activations [..., D].

    turn: as `turn` gives for their positions [...].
    """
    c, product = self.config, product or self.product
    h = self.attention_norm(x_XD)
    q, k, v = (product(name, h) for name in ("query", "key", "value"))
    q, k, v = (a.reshape(*a.shape[:-1], -1, c.resolved_head_width) for a in (q, k, v))
    if c.qk_norm:
      q, k = self.query_norm(q), self.key_norm(k)
    return rotate(q, turn), rotate(k, turn), v

  def complete(self, x_XD, mixed_XHE, product=None):
    """What comes after attention: the layer's output [..., D] from its input and the mixed values."""
    product = product or self.product
    x = x_XD + product("out", mixed_XHE.reshape(*x_XD.shape[:-1], -1))
    h = self.mlp_norm(x)
    return x + product("down", jax.nn.silu(product("gate", h)) * product("up", h))


CONTROL_ROWS = 3
"""START, STOP and PAUSE."""


def table_rows(config: ModelConfig, vocabulary_size: int, confidences: int) -> int:
  """Rows of the embedding table: real tokens, control rows and confidences, rounded up."""
  multiple = config.vocabulary_multiple
  return -(-(vocabulary_size + CONTROL_ROWS + confidences) // multiple) * multiple


class Decoder(nnx.Module):
  """The decoder over a vocabulary of real tokens and three control rows: START, STOP and PAUSE.

  The control rows are rows of the embedding table and never a real token: `logits` masks them, so they cannot be
  predicted, sampled, or produced by text. Thoughts that report confidences have as many more of them.
  """

  def __init__(
    self,
    config: ModelConfig,
    vocabulary_size: int,
    rngs: nnx.Rngs,
    heads: Sequence[str] = (),
    confidences: int = 0,
    border: int | None = None,
  ):
    self.config, self.vocabulary_size = config, vocabulary_size
    self.confidences, self.border = confidences, border
    D, rows = config.width, table_rows(config, vocabulary_size, confidences)
    self.embedding = parameter(rngs, (rows, D), ("vocab", "embed"), D**-0.5)
    stack = nnx.vmap(
      lambda rngs: Layer(config, rngs), axis_size=config.layers, transform_metadata={nnx.PARTITION_NAME: "layers"}
    )
    self.layers = nnx.split_rngs(splits=config.layers)(stack)(rngs)
    self.final_norm = RMSNorm(D, "embed")
    if not config.tie_embeddings:
      self.head = parameter(rngs, (D, rows), ("embed", "vocab"), D**-0.5)
    if config.latent_map == "linear":
      identity = nnx.with_partitioning(_identity, ("embed", None), eager_sharding=False)
      self.latent = nnx.Param(identity(None, (D, D), jnp.float32))
    # Last, so that the other parameters are drawn the same with them and without.
    self.heads = nnx.Dict({name: pick(HEADS, name, "head")(D, rngs) for name in sorted(heads)})

  @property
  def start(self) -> int:
    """Row that opens a thought."""
    return self.vocabulary_size

  @property
  def stop(self) -> int:
    """Row that closes a thought."""
    return self.vocabulary_size + 1

  @property
  def pause(self) -> int:
    """Row of the pause thought."""
    return self.vocabulary_size + 2

  @property
  def lowest(self) -> int:
    """Row of confidence 0; those above it follow."""
    return self.vocabulary_size + CONTROL_ROWS

  def embed_row(self, row: int, *shape: int):
    """The embedding of one id, everywhere: [*shape, D]. Repeated before the cast, so that gradients add in float32."""
    return self._scale(jnp.broadcast_to(self.embedding[row], (*shape, self.config.width)))

  def embed(self, tokens_BX):
    """Embeddings [B, ..., D] of ids, rows first; of unit mean square at initialisation, like the final norm's output.

    Devices look up their part of D for all rows of their copy, then these change places. Left to itself the compiler
    moves the table, and between copies too.
    """
    axes = ("length", *(None,) * (tokens_BX.ndim - 2))[: tokens_BX.ndim - 1]
    tokens_BX = constrain(tokens_BX, "copies", *axes)
    found_BXD = self.embedding[...].at[tokens_BX].get(mode="clip")
    return rows_of_columns(self._scale(found_BXD), *axes)

  def mix(self, weights):
    """Weighted mean of embeddings [..., D]; weights [..., rows] over the rows of the table."""
    return self._scale(matmul(weights, self.embedding[...]))

  def _scale(self, rows):
    return (rows * self.config.width**0.5).astype(DTYPES[self.config.compute_dtype])

  def feedback(self, hidden):
    """The input of a latent thought from the hidden state before it, both [..., D] (Coconut, arXiv:2412.06769)."""
    return hidden if self.config.latent_map == "identity" else matmul(hidden, self.latent[...])

  def logits(self, hidden, stop=False, confidence=False):
    """float32 logits [..., rows] of hidden states [..., D]; all but real tokens are masked.

    Args:
      stop: STOP is allowed too. confidence: the confidence rows are allowed, and nothing else. Either is a bool, or one
        for each hidden state.
    """
    head = self.embedding[...].T if self.config.tie_embeddings else self.head[...]
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = product("xd,dv->xv", flat, head.astype(flat.dtype))
    if self.config.logit_cap:
      logits = self.config.logit_cap * jnp.tanh(logits / self.config.logit_cap)
    row = jnp.arange(head.shape[-1])
    stop, confidence = (jnp.asarray(a)[..., None] for a in (stop, confidence))
    real = (row < self.vocabulary_size) | (stop & (row == self.stop))
    said = (row >= self.lowest) & (row < self.lowest + self.confidences)
    return jnp.where(jnp.where(confidence, said, real), logits.reshape(*hidden.shape[:-1], -1), MASKED)

  def __call__(self, x_BPQD, positions_BPQ, mask_BPQQ, past: Seen | None = None, own: Seen | None = None):
    """Runs P streams of Q inputs through all layers.

    Args:
      x_BPQD: inputs (from `embed`, `mix` or `feedback`). positions_BPQ: rotary positions.
      mask_BPQQ: bool, which of this call's own inputs each query sees.
      past: cached keys that all streams share. own: cached keys of each stream.

    Returns:
      (hidden_BPQD after the final norm, Cache of this call's keys and values [L, B, P, Q, K, E]).
    """
    x, cache, _ = self.layered(x_BPQD, positions_BPQ, mask_BPQQ, past, own, keep=False)
    return self.final_norm(x), cache

  def layered(self, x_BPQD, positions_BPQ, mask_BPQQ, past=None, own=None, keep: bool = True):
    """The same without the final norm: (x_BPQD after the last layer, Cache, inputs_LBPQD of every layer or None)."""
    graph, layers = nnx.split(self.layers)
    turn = self.layers.turn(positions_BPQ)

    seen = [each for each in (past, own) if each is not None]
    index = jnp.arange(self.config.layers) if any(each.count is not None for each in seen) else None

    def body(x, scanned):
      params, layer, caches = scanned
      keys = [_keys(each, cache, layer) for each, cache in zip(seen, caches, strict=True)]
      y, new = nnx.merge(graph, params)(x, turn, mask_BPQQ, keys)
      return constrain(y, *ACTIVATIONS), (Cache(*new), x if keep else None)

    start = constrain(x_BPQD, *ACTIVATIONS)
    scanned = (layers, index, [each.cache if each.count is None else None for each in seen])
    x, made = jax.lax.scan(REMAT[self.config.remat](body), start, scanned, unroll=self.config.unroll)
    return x, *made


def _keys(seen: Seen, cache: Cache | None, layer) -> Keys:
  """The keys of one layer. Its part of a cache with room left is not cut out: it would be a copy of all of it."""
  if seen.count is None:
    return Keys(*cache, seen.mask_BPQS)
  return Keys(*seen.cache, seen.mask_BPQS, Filled(layer, seen.count))


class Model:
  """The decoder as pure functions of its parameters.

  init(key): params, a nested dict of float32 arrays. axes: the same dict with the logical name of every axis.
  bind(params): a Decoder that holds them, for use inside a traced function. heads: names of `heads.HEADS` that exist.
  confidences: control rows for a report. border: the real token that ends a document, and an answer; None: none does.
  """

  def __init__(
    self,
    config: ModelConfig,
    vocabulary_size: int,
    heads: Sequence[str] = (),
    confidences: int = 0,
    border: int | None = None,
  ):
    self.config, self.vocabulary_size = config, vocabulary_size
    self.heads, self.confidences, self.border = tuple(heads), confidences, border
    self._graph, state = nnx.split(nnx.eval_shape(lambda: self._fresh(0)))
    self.shapes = nnx.to_pure_dict(state)
    self.axes = axes(state)

  @property
  def size(self) -> int:
    """Number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.shapes))

  def init(self, key) -> Params:
    """Fresh parameters."""
    return nnx.to_pure_dict(nnx.split(self._fresh(key))[1])

  def confidence(self, token: int) -> float | None:
    """What a row says in a report, in [0, 1]; None for rows that are no confidence."""
    place = token - self.vocabulary_size - CONTROL_ROWS
    return place / (self.confidences - 1) if 0 <= place < self.confidences else None

  def _fresh(self, key) -> Decoder:
    rngs = nnx.Rngs(params=key)
    return Decoder(self.config, self.vocabulary_size, rngs, self.heads, self.confidences, self.border)

  def bind(self, params: Params) -> Decoder:
    """The decoder with these parameters."""
    return nnx.merge(self._graph, params)


def axes(state):
  """Nested dict of the logical axis names that `parameter` put on each variable."""
  return {
    name: tuple(value.get_metadata("out_sharding")) if isinstance(value, nnx.Variable) else axes(value)
    for name, value in state.items()
  }


def _identity(key, shape, dtype):
  del key  # an initializer's signature
  return jnp.eye(*shape, dtype=dtype)
