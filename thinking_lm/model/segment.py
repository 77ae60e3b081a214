"""One segment of a serial persistent stream, forward: rounds of decoder calls against a cache of exactly their size.

A thought whose tokens are each made from the hidden state before it takes one decoder call a think token. Everything
else is known beforehand, so it is never fed on its own: a *round* is one joint call over

    the last think token of the thought before, its STOP | real tokens | the START of the next thought

and one single call for each think token of that next thought but its last. Slots keep the order of the stream; a round
only starts 1 or 2 slots (`lead`) before its real tokens do. The first round's lead is empty: document 0, seen by none.

A *segment* is some rounds of equal shape. Its cache holds the slots of earlier segments and its own, no more, so that
a think step costs what there is to see; a stream is cut into a few of them (`model/serial.py`). How gradients flow is
told in `model/reverse.py`.

What exists once a layer (weights, caches, activations) is *layered*: a list of L pytrees for a few layers, else one
pytree with a leading axis L. Slots are the last axis but one of layered arrays, whichever of the two it is.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from thinking_lm.model.attention import MASKED
from thinking_lm.model.decoder import DTYPES, Cache, Decoder, axes
from thinking_lm.model.layers import product
from thinking_lm.model.thinking import emit
from thinking_lm.sharding import constrain, gathered
from thinking_lm.thoughts import halting, topology
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.thoughts.tokens import fold

CACHED = ("batch", "kv_heads", None, None)
"""Logical axes of keys and values [B, K, A, E]. Slots are never split: a loop reads and writes them one by one."""

ROWS = ("batch", None, None)
"""Logical axes of activations [B, Q, D]."""

UNROLLED = 4
"""Up to so many layers are unrolled. A scan over layers copies the weights of each in every step, but compiles once."""


class Shape(NamedTuple):
  """The rounds of a segment: how many, and the slots of each part of a round."""

  rounds: int
  lead: int
  real: int
  opening: int
  singles: int

  @property
  def joint(self) -> int:
    """Slots of the joint call."""
    return self.lead + self.real + self.opening

  @property
  def width(self) -> int:
    """Slots of a round."""
    return self.joint + self.singles

  @property
  def slots(self) -> int:
    """Slots of the segment."""
    return self.rounds * self.width


class Spec(NamedTuple):
  """All that is static: the decoder without its parameters, the thoughts, and the rounds."""

  graph: nnx.GraphDef
  config: ThoughtConfig
  shape: Shape

  def thoughts(self, facts: "Facts") -> ThoughtConfig:
    """The config with a temperature that may be traced."""
    return self.config if facts.temperature is None else dataclasses.replace(self.config, temperature=facts.temperature)


class Facts(NamedTuple):
  """What no gradient flows to. S slots of the segment, A slots of it and all before.

  positions_BS: rotary positions. segments_BA: document of each slot, 0 for empty ones. ends_RB, begins_RB: keys of the
  thought that ends in each round, and of the one that begins there; None for kinds that draw nothing. temperature:
  where it is a traced number; None where the config's is.
  """

  positions_BS: jax.Array
  segments_BA: jax.Array
  ends_RB: jax.Array | None
  begins_RB: jax.Array | None
  temperature: jax.Array | None


class State(NamedTuple):
  """What a round hands to the next: the hidden state that the last think token is made from, and the thought so far."""

  hidden_BD: jax.Array
  progress: halting.Progress


class Made(NamedTuple):
  """What a segment leaves, slot by slot.

  hidden_BSD: hidden states. inputs_BSD: what was fed. tokens_BS: ids of think tokens, else -1. used_RB: think tokens
  that the thought which ends in a round has used. sources_RnBD: the hidden state that each think token of a round was
  made from, the last of the thought before first. segments_BA: documents, without slots behind the ends of thoughts.
  """

  hidden_BSD: jax.Array
  inputs_BSD: jax.Array
  tokens_BS: jax.Array
  used_RB: jax.Array
  sources_RnBD: jax.Array
  segments_BA: jax.Array


def layered(tree: Any, layers: int) -> Any:
  """A pytree with a leading axis L as a list of L pytrees, where layers are unrolled."""
  if layers > UNROLLED:
    return tree
  return [jax.tree.map(lambda a, number=number: a[number], tree) for number in range(layers)]


def stacked(tree: Any) -> Any:
  """The opposite of `layered`."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *tree) if isinstance(tree, list) else tree


def each(function, tree: Any) -> Any:
  """function(one layer, or all of them with their leading axis), of a layered pytree."""
  return [function(one) for one in tree] if isinstance(tree, list) else function(tree)


def sweep(body, carry, *trees, reverse: bool = False):
  """Scans body(carry, *one layer of each tree) -> (carry, y) over the layers. Returns (carry, layered y)."""
  if not isinstance(trees[0], list):
    return jax.lax.scan(lambda carry, xs: body(carry, *xs), carry, trees, reverse=reverse)
  found = []
  order = list(zip(*trees, strict=True))
  for one in reversed(order) if reverse else order:
    carry, y = body(carry, *one)
    found.append(y)
  return carry, found[::-1] if reverse else found


def cut(tree: Any, start, size: int) -> Any:
  """Slots start ... start + size - 1 of layered arrays."""
  return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size, axis=a.ndim - 2), tree)


def put(tree: Any, new: Any, start) -> Any:
  """Layered arrays with `new` in slots from `start` on."""
  return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, start, axis=a.ndim - 2), tree, new)


def named(spec: Spec, params) -> dict:
  """The logical axis names of all parameters."""
  return axes(nnx.split(nnx.merge(spec.graph, params))[1])


def bind(spec: Spec, params) -> tuple[Decoder, Any, Any]:
  """(`whole` decoder, a function from one layer's weights to the layer, layered weights)."""
  decoder = whole(nnx.merge(spec.graph, params))
  graph, weights = nnx.split(decoder.layers)
  weights = layered(nnx.to_pure_dict(weights), decoder.config.layers)
  return decoder, lambda weights: nnx.merge(graph, weights), weights


def whole(decoder: Decoder) -> Decoder:
  """The decoder as a serial loop reads it: every slot reads all matrices, so they are cast and gathered once.

  The head too, beside the table where both are one: ids are looked up in float32, by columns (`Decoder.embed`).
  """
  graph, state = nnx.split(decoder)
  params, names, c = nnx.to_pure_dict(state), axes(state), decoder.config
  cast = lambda w: w.astype(DTYPES[c.compute_dtype])
  matrices, norms = parts(params["layers"])
  made = nnx.merge(graph, gathered(params | dict(layers=jax.tree.map(cast, matrices) | norms), names))
  head, split = params.get("head"), names.get("head")
  if c.tie_embeddings:
    head, split = params["embedding"].T, names["embedding"][::-1]
  made.config = dataclasses.replace(c, tie_embeddings=False)
  made.head = nnx.Param(gathered(cast(head), split))
  return made


def parts(weights: dict) -> tuple[dict, dict]:
  """(matrices, norms) of the parameters of layers."""
  norms = {name: leaf for name, leaf in weights.items() if isinstance(leaf, dict)}
  return {name: leaf for name, leaf in weights.items() if name not in norms}, norms


def pinned(tree: Any, *names: str | None) -> Any:
  """Layered arrays, each layer of which is split as `sharding.constrain` says."""
  return jax.tree.map(lambda a: constrain(a, *[None] * (a.ndim - len(names)), *names), tree)


def grow(decoder: Decoder, past: list, B: int, S: int):
  """Layered cache of the slots of earlier segments and S free ones; keys and values are [B, K, A, E]."""
  c = decoder.config
  shape = (c.layers, B, c.resolved_kv_heads, S, c.resolved_head_width)
  free = layered(Cache(*(jnp.zeros(shape, DTYPES[c.compute_dtype]) for _ in range(2))), c.layers)
  whole = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-2), *past, free) if past else free
  return pinned(whole, *CACHED)


multiply = functools.partial(product, "bkmx,bkxn->bkmn")
"""Products of left_BKMX and right_BKXN in float32, in the one form that XLA's CPU backend also has for bfloat16."""


def weigh(q_BQHE, k_BKAE, mask_BQA):
  """Attention weights [B, K, H / K, Q, A] in float32; uniform for a query that sees nothing."""
  B, Q, H, E = q_BQHE.shape
  K = k_BKAE.shape[1]
  q_BKME = jnp.moveaxis((q_BQHE * E**-0.5).reshape(B, Q, K, H // K, E), 1, 3).reshape(B, K, -1, E)
  score_BKRQA = multiply(q_BKME, jnp.swapaxes(k_BKAE, 2, 3)).reshape(B, K, H // K, Q, -1)
  return jax.nn.softmax(jnp.where(mask_BQA[:, None, None], score_BKRQA, MASKED), axis=-1)


def mix(weights_BKRQA, v_BKAE):
  """Values [B, Q, H, E] mixed by attention weights, in the type of the values."""
  B, K, R, Q, A = weights_BKRQA.shape
  mixed_BKME = multiply(weights_BKRQA.astype(v_BKAE.dtype).reshape(B, K, R * Q, A), v_BKAE)
  return jnp.moveaxis(mixed_BKME.astype(v_BKAE.dtype).reshape(B, K, R, Q, -1), 3, 1).reshape(B, Q, K * R, -1)


def visible(segments_BA, start, Q: int):
  """mask_BQA of the Q slots from `start` on: the slots of their document up to their own."""
  own = jax.lax.dynamic_slice_in_dim(segments_BA, start, Q, axis=1)
  return topology.sees(own, segments_BA, start + jnp.arange(Q), jnp.arange(segments_BA.shape[1]))[:, 0]


def anchor(shape: Shape, segments_BA, start):
  """anchor_B: the slot of a joint call at `start` whose hidden state the first think token is made from.

  That is START, or else the last real token, found by its place: padding may stand between documents.
  """
  if shape.opening or not shape.real:
    return jnp.full(segments_BA.shape[:1], shape.joint - 1)
  real = jax.lax.dynamic_slice_in_dim(segments_BA, start + shape.lead, shape.real, axis=1)
  return shape.lead + jnp.max(jnp.where(real > 0, jnp.arange(shape.real), 0), axis=1)


def forward(spec: Spec, params, known_BSD, facts: Facts, state: State, past: list):
  """Runs the rounds of a segment.

  Args:
    known_BSD: inputs of real and control slots; at think tokens what is added to them (zeros, to tap their gradient).
    past: layered caches of the segments before.

  Returns:
    (Made, the segment's own layered cache, State after the last round).
  """
  config, shape, (decoder, layer_of, weights) = spec.thoughts(facts), spec.shape, bind(spec, params)
  B, S, A, n = *known_BSD.shape[:2], facts.segments_BA.shape[1], config.length

  def call(caches, x_BQD, segments_BA, first):
    positions_BQ = jax.lax.dynamic_slice_in_dim(facts.positions_BS, first, x_BQD.shape[1], axis=1)
    return _call(decoder, layer_of, weights, caches, x_BQD, positions_BQ, segments_BA, A - S + first)

  def round_(carry, scanned):
    (source, progress), segments, caches = carry
    r, ends_B, begins_B = scanned
    first = r * shape.width
    z, token = emit(decoder, config, source, fold(ends_B, n - 1), n - 1, progress)
    used_B = halting.drawn(decoder, config, progress, token, n - 1).used_X
    if config.may_end:
      segments = _end(config, segments, used_B, A - S + first + shape.lead)
    x = cut(known_BSD, first, shape.joint).at[:, 0].add(z)
    joint, caches = call(caches, x, segments, first)
    hidden = jnp.take_along_axis(joint, anchor(shape, segments, A - S + first)[:, None, None], axis=1)[:, 0]
    hidden = constrain(hidden, "batch", None)
    progress = halting.begin(decoder, config, hidden, begins_B)

    def single(carry, i):
      (source, progress), caches = carry
      z, token = emit(decoder, config, source, fold(begins_B, i), i, progress)
      progress = halting.drawn(decoder, config, progress, token, i)
      z += cut(known_BSD, first + shape.joint + i, 1)[:, 0]
      hidden, caches = call(caches, z[:, None], segments, first + shape.joint + i)
      progress = halting.reached(decoder, config, progress, hidden[:, 0], i + 1)
      return (State(hidden[:, 0], progress), caches), (hidden[:, 0], z, token, source)

    (state, caches), made = jax.lax.scan(single, (State(hidden, progress), caches), jnp.arange(shape.singles))
    states, inputs, ids, sources = made
    rows = lambda first, rest: jnp.concatenate([first, jnp.moveaxis(rest, 0, 1)], axis=1)
    ids = rows(jnp.full((B, shape.joint), -1).at[:, 0].set(token), ids)
    slots = (rows(joint, states), rows(x, inputs), ids)
    state = state._replace(hidden_BD=constrain(state.hidden_BD, "batch", None))
    return (state, segments, caches), (slots, used_B, jnp.concatenate([source[None], sources]))

  carry = (state, facts.segments_BA, grow(decoder, past, B, S))
  scanned = (jnp.arange(shape.rounds), facts.ends_RB, facts.begins_RB)
  (state, segments, caches), (slots, used_RB, sources) = jax.lax.scan(round_, carry, scanned)
  slots = [jnp.moveaxis(a, 0, 1).reshape(B, S, *a.shape[3:]) for a in slots]
  slots, sources = [*constrain(slots[:2], *ROWS), slots[2]], constrain(sources, None, None, "batch", None)
  return Made(*slots, used_RB, sources, segments), cut(caches, A - S, S), state


def _call(decoder, layer_of, weights, caches, x_BQD, positions_BQ, segments_BA, start):
  """The decoder over cache slots start ... start + Q - 1: (hidden_BQD, layered caches with their keys and values)."""
  mask, turn = visible(segments_BA, start, x_BQD.shape[1]), decoder.layers.turn(positions_BQ)

  def body(x, weights, cache):
    layer = layer_of(weights)
    q, k, v = layer.project(x, turn)
    new = Cache(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))
    seen = put(cache, new, start)
    return constrain(layer.complete(x, mix(weigh(q, seen.k, mask), seen.v)), *ROWS), pinned(new, *CACHED)

  x, new = sweep(body, constrain(x_BQD, *ROWS), weights, caches)
  return decoder.final_norm(x), pinned(put(caches, new, start), *CACHED)


def _end(config, segments_BA, used_B, stop):
  """Documents without the slots behind the end of the thought whose J slots come right before slot `stop`."""
  index = jnp.arange(segments_BA.shape[1]) - (stop - config.slots)
  over_BA = (index > config.last(used_B)[:, None]) & (index >= 0) & (index < config.slots)
  return jnp.where(over_BA, 0, segments_BA)
