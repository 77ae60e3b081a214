"""One segment of a serial persistent stream, backward: exact, without a saved cache or a weight gradient a step.

Autodiff of the forward scan keeps the whole cache once a round and adds a full set of weight gradients once a call.
Here a segment keeps only what was fed to it (known inputs and think tokens), the hidden states that think tokens were
made from, and its cache. Why that is enough, and exact:

1. *The cache is written once.* A slot's keys and values never change after its call, so that under a mask of earlier
   slots the final cache is the cache that any call saw.
2. *What was fed is known now.* All activations are recomputed in one parallel pass over the segment's slots
   (`_recompute`). The attention weights of a slot are a row of one matrix.
3. *Only cotangents are serial.* A think token's input was made from the hidden state before it, so that calls are
   visited backwards, one by one (`_Calls`). A visit transposes the layers around recorded values: `_replay` returns the
   recorded product of a matrix, and passes its cotangent on through the transposed matrix. No forward product is
   repeated.
4. *Keys and values gather.* With w the attention weights, do the cotangent of mixed values, and
   dscore = w (do . v - sum(w (do . v))), a slot's key receives the sum over later slots of dscore q, and its value that
   of w do. When a slot is visited all later slots of the segment are done: their rows of dscore and do are in buffers,
   and the slot reads its column. What earlier segments receive is one product after the scan, and goes on by autodiff.
5. *Matrices come last.* The cotangent of each product is left in a buffer; one product of all inputs with all
   cotangents gives a matrix's gradient. Norm scales are small and summed on the way. What makes think tokens (head,
   embeddings, latent map) has its parameters' gradient taken over all think tokens at once.

The recomputed activations equal the forward ones to rounding, and so do the gradients equal those of plain autodiff.
Think tokens are the forward pass's own: a drawn token cannot flip. What remat keeps plays no part here.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from thinking_lm.model.decoder import Cache
from thinking_lm.model.layers import matmul
from thinking_lm.model.segment import (
  CACHED,
  ROWS,
  Facts,
  Spec,
  State,
  anchor,
  bind,
  cut,
  each,
  forward,
  mix,
  multiply,
  named,
  parts,
  pinned,
  put,
  stacked,
  sweep,
  visible,
  weigh,
)
from thinking_lm.sharding import constrain, constrain_each
from thinking_lm.thoughts.tokens import fold


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def segment(spec: Spec, params, known_BSD, facts: Facts, state: State, past: list):
  """`segment.forward` with the backward pass of this file. No gradient flows to or from `Made.inputs_BSD`."""
  return forward(spec, params, known_BSD, facts, state, past)


def _forward(spec, params, known_BSD, facts, state, past):
  made, cache, _ = found = forward(spec, params, known_BSD, facts, state, past)
  facts = facts._replace(segments_BA=made.segments_BA)
  return found, (params, facts, made, cache, past)


def _backward(spec, kept, cotangents):
  params, facts, made, cache, past = kept
  dmade, dcache, dstate = cotangents
  calls = _Calls(spec, params, facts, made, [*past, cache], dmade.hidden_BSD, dcache)
  buffers, scales, dhidden_BD = calls.rounds(dstate.hidden_BD)
  dparams = _parameters(spec, params, facts, made, calls.saved, *buffers, scales)
  dparams = constrain_each(dparams, named(spec, params))
  dpast = _earlier(calls.saved, buffers.rows, past)
  return dparams, buffers.dx_BSD, None, State(dhidden_BD, None), dpast


segment.defvjp(_forward, _backward)


FIRST = dict(query="query", key="query", value="query", out="out", gate="gate", up="gate", down="down")
"""Matrix of a layer -> the first one that multiplies the same input."""

SCORES = ("batch", "kv_heads", "heads", None, None)
"""Logical axes of attention scores [B, K, H / K, S, A]: tensor splits either kind of heads."""


class _Saved(NamedTuple):
  """What `_recompute` keeps of a layer, for the slots of a segment; an item of layered values.

  x_BSD: the layer's input. queries_BSX: its queries, X = H E. weights_BKRSA: attention weights, in the type that values
  are mixed in. inputs, outputs: of the products with each matrix, by name; an input that several products share is that
  of the first of them (`FIRST`), and the output of `down` is never needed.
  """

  x_BSD: jax.Array
  queries_BSX: jax.Array
  weights_BKRSA: jax.Array
  inputs: dict
  outputs: dict


class _Rows(NamedTuple):
  """Cotangents of a layer, filled in from the last slot to the first; an item of layered values.

  dscore_BKRSA: of attention scores. dmixed_BSX: of mixed values. outputs: of the product with each matrix, by name.
  """

  dscore_BKRSA: jax.Array
  dmixed_BSX: jax.Array
  outputs: dict


class _Buffers(NamedTuple):
  """rows: layered _Rows. dx_BSD: cotangents of the inputs of all slots."""

  rows: list | _Rows
  dx_BSD: jax.Array


@jax.custom_vjp
def _replay(x, transposed_OI, y):
  """The recorded product y of x with a matrix. The cotangent of y is that of the product."""
  del x, transposed_OI
  return y


_replay.defvjp(lambda x, transposed, y: (y, transposed), lambda transposed, dy: (matmul(dy, transposed), None, dy))


def _split(name: str, which: int) -> tuple[str | None, ...]:
  """Logical axes of what goes into (0) or comes out of (1) the product with a matrix, [B, S, X]."""
  tensor = dict(out=("heads", None), gate=(None, "mlp"), up=(None, "mlp"), down=("mlp", None))
  return ("batch", None, tensor.get(name, (None, "heads"))[which])


def _pin(found):
  """Layered _Saved or _Rows, split over the mesh."""
  if isinstance(found, list):
    return each(_pin, found)
  outputs = {name: pinned(a, *_split(name, 1)) for name, a in found.outputs.items()}
  if isinstance(found, _Rows):
    return _Rows(pinned(found.dscore_BKRSA, *SCORES), pinned(found.dmixed_BSX, *_split("out", 0)), outputs)
  inputs = {name: pinned(a, *_split(name, 0)) for name, a in found.inputs.items()}
  queries_BSX, weights_BKRSA = pinned(found.queries_BSX, *_split("query", 1)), pinned(found.weights_BKRSA, *SCORES)
  return _Saved(pinned(found.x_BSD, *ROWS), queries_BSX, weights_BKRSA, inputs, outputs)


def _recompute(decoder, layer_of, weights, facts, caches, x_BSD):
  """(states before the final norm, layered _Saved) of all slots of a segment at once, against the final cache."""
  S = x_BSD.shape[1]
  mask = visible(facts.segments_BA, facts.segments_BA.shape[1] - S, S)
  turn = decoder.layers.turn(facts.positions_BS)

  def body(x, weights, cache):
    inputs, outputs = {}, {}

    def record(name, h):
      inputs[FIRST[name]], outputs[name] = h, matmul(h, weights[name])
      return outputs[name]

    layer = layer_of(weights)
    q, _, _ = layer.project(x, turn, record)
    seen = weigh(q, cache.k, mask)
    y = layer.complete(x, mix(seen, cache.v), record)
    del outputs["down"]
    return constrain(y, *ROWS), _pin(_Saved(x, q.reshape(*q.shape[:2], -1), seen.astype(q.dtype), inputs, outputs))

  return sweep(body, constrain(x_BSD, *ROWS), weights, caches)


class _Calls:
  """The backward scan over the calls of a segment, from the last to the first."""

  def __init__(self, spec, params, facts, made, caches, dhidden_BSD, dcache):
    self.spec, self.facts, self.made, self.dhidden_BSD, self.dcache = spec, facts, made, dhidden_BSD, dcache
    self.decoder, self.layer_of, self.weights = bind(spec, params)
    self.caches = pinned(jax.tree.map(lambda *pieces: jnp.concatenate(pieces, axis=-2), *caches), *CACHED)
    self.last_BSD, self.saved = _recompute(
      self.decoder, self.layer_of, self.weights, facts, self.caches, made.inputs_BSD
    )
    flip = lambda weights: jax.tree.map(lambda w: jnp.swapaxes(w, -1, -2), parts(weights)[0])
    norms = lambda weights: {name: self._by_row(name, norm["scale"]) for name, norm in parts(weights)[1].items()}
    self.transposed, self.norms = each(flip, self.weights), each(norms, self.weights)
    self.final_norm = self._by_row("final_norm", self.decoder.final_norm.scale[...])

  def _by_row(self, name: str, scale):
    """{"scale": that of a norm for each row}: summed over rows once, after the scan, and not in every call."""
    B, ones = self.made.inputs_BSD.shape[0], (1, 1) if name in ("query_norm", "key_norm") else (1,)
    *edge, width = scale.shape
    rows = jnp.broadcast_to(scale.reshape(*edge, 1, *ones, width), (*edge, B, *ones, width))
    return {"scale": pinned(rows, "batch", *[None] * len(ones), None)}

  def rounds(self, dhidden_BD):
    """Visits all rounds. dhidden_BD: of State.hidden_BD after the last.

    Returns (_Buffers, cotangents of (layered norms, scale of the final norm), dhidden_BD before the first round).
    """
    rows = lambda saved: _Rows(saved.weights_BKRSA, saved.queries_BSX, saved.outputs | dict(down=saved.x_BSD))
    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    buffers = _Buffers(_pin(zeros(each(rows, self.saved))), pinned(zeros(self.made.inputs_BSD), *ROWS))
    carry = (buffers, zeros((self.norms, self.final_norm)), dhidden_BD)
    return jax.lax.scan(self._round, carry, jnp.arange(self.spec.shape.rounds), reverse=True)[0]

  def _round(self, carry, r):
    shape, n = self.spec.shape, self.spec.config.length
    first, at = r * shape.width, self._column(r * shape.width)
    ends_B, begins_B = (None if keys is None else keys[r] for keys in (self.facts.ends_RB, self.facts.begins_RB))

    def single(carry, i):
      buffers, scales, dhidden_BD = carry
      buffers, scales, dx_B1D = self._call(buffers, scales, dhidden_BD[:, None], first + shape.joint + i)
      return (buffers, scales, self._source(r, i + 1, begins_B, i, dx_B1D[:, 0])), None

    carry, _ = jax.lax.scan(single, carry, jnp.arange(shape.singles), reverse=True)
    buffers, scales, dhidden_BD = carry
    anchor_BQ = jnp.arange(shape.joint) == anchor(shape, self.facts.segments_BA, at)[:, None]
    dhidden_BQD = jnp.where(anchor_BQ[..., None], dhidden_BD[:, None], 0)
    buffers, scales, dx_BQD = self._call(buffers, scales, dhidden_BQD, first)
    return (buffers, scales, self._source(r, 0, ends_B, n - 1, dx_BQD[:, 0])), None

  def _column(self, first):
    """The place of a slot of the segment among all slots of the cache."""
    return self.facts.segments_BA.shape[1] - self.made.inputs_BSD.shape[1] + first

  def _source(self, r, number, keys_B, i, dz_BD):
    """Cotangent of the hidden state that think token i was made from, a round's `number`-th."""
    config, source_BD = self.spec.thoughts(self.facts), self.made.sources_RnBD[r, number]
    if config.kind_of.discrete:
      return jnp.zeros_like(source_BD)
    make = lambda hidden_BD: config.kind_of.step(self.decoder, hidden_BD, fold(keys_B, i), config)[0]
    return jax.vjp(make, source_BD)[1](dz_BD)[0]

  def _call(self, buffers, scales, dhidden_BQD, first):
    """Transposes the call of Q slots from `first` on: (buffers, scales, dx_BQD).

    dhidden_BQD: cotangents of its hidden states from the think tokens that were made of them.
    """
    Q = dhidden_BQD.shape[1]
    graph = nnx.split(self.decoder.final_norm)[0]
    norm = lambda scale, x: nnx.merge(graph, scale)(x)
    _, pull = jax.vjp(norm, self.final_norm, cut(self.last_BSD, first, Q))
    dfinal, dx_BQD = pull(dhidden_BQD + cut(self.dhidden_BSD, first, Q))
    layers = (self.weights, self.norms, self.transposed, self.caches, self.dcache, self.saved, buffers.rows)
    turn = self.decoder.layers.turn(jax.lax.dynamic_slice_in_dim(self.facts.positions_BS, first, Q, axis=1))
    dx_BQD, found = sweep(functools.partial(self._layer, first, turn), dx_BQD, *layers, reverse=True)
    rows, dnorms = (each(lambda one, i=i: one[i], found) for i in (0, 1))
    buffers = _Buffers(_pin(put(buffers.rows, rows, first)), pinned(put(buffers.dx_BSD, dx_BQD, first), *ROWS))
    return buffers, jax.tree.map(jnp.add, scales, (dnorms, dfinal)), dx_BQD

  def _layer(self, first, turn, dy_BQD, weights, norms, transposed, cache, dcache, saved, rows):
    """Transposes one layer of a call: (dx_BQD, (_Rows of its slots, cotangents of the norms))."""
    Q = dy_BQD.shape[1]
    x_BQD = cut(saved.x_BSD, first, Q)
    early = {name: cut(saved.outputs[name], first, Q) for name in ("query", "key", "value")}
    late = {name: cut(saved.outputs[name], first, Q) for name in ("out", "gate", "up")} | dict(down=x_BQD)

    def recorded(outputs):
      return lambda name, h: _replay(h, transposed[name], outputs[name])

    def project(norms, x, outputs):
      return self.layer_of(weights | norms).project(x, turn, recorded(outputs))

    def complete(norms, x, mixed, outputs):
      return self.layer_of(weights | norms).complete(x, mixed, recorded(outputs))

    (q_BQHE, *_), pull_project = jax.vjp(project, norms, x_BQD, early)
    _, pull_complete = jax.vjp(complete, norms, x_BQD, jnp.zeros_like(q_BQHE), late)
    dnorms, dx_BQD, dmixed_BQHE, dlate = pull_complete(dy_BQD)
    dmixed_BQX = dmixed_BQHE.reshape(*dy_BQD.shape[:2], -1)
    dqkv, dscore_BKRQA = self._attention(cache, dcache, saved, rows, dmixed_BQX, first)
    more_dnorms, more_dx_BQD, dearly = pull_project(dqkv)
    found = _pin(_Rows(dscore_BKRQA, dmixed_BQX, dearly | dlate))
    return constrain(dx_BQD + more_dx_BQD, *ROWS), (found, jax.tree.map(jnp.add, dnorms, more_dnorms))

  def _attention(self, cache, dcache, saved, rows, dmixed_BQX, first):
    """((dq_BQHE, dk_BQKE, dv_BQKE), dscore_BKRQA) of a call in one layer."""
    (B, K, _, E), (_, Q, _), dtype = cache.k.shape, dmixed_BQX.shape, cache.k.dtype
    columns = lambda a_BKRXA: jax.lax.dynamic_slice_in_dim(a_BKRXA, self._column(first), Q, axis=4)
    slots = lambda a_BKRSQ: jnp.moveaxis(a_BKRSQ, 4, 2).reshape(B, K, Q, -1)
    weights_BKRQA = cut(saved.weights_BKRSA, first, Q).astype(jnp.float32)
    dweights_BKMA = multiply(_heads(dmixed_BQX, K, E), jnp.swapaxes(cache.v, 2, 3))
    dweights_BKRQA = dweights_BKMA.reshape(weights_BKRQA.shape)
    spread = jnp.sum(weights_BKRQA * dweights_BKRQA, axis=-1, keepdims=True)
    dscore_BKRQA = (weights_BKRQA * (dweights_BKRQA - spread)).astype(dtype)

    dq_BKME = multiply(dscore_BKRQA.reshape(dweights_BKMA.shape), cache.k) * E**-0.5
    dq_BQKRE = jnp.moveaxis(dq_BKME.reshape(B, K, -1, Q, E), 3, 1)
    dscore_BKRSQ = put(columns(rows.dscore_BKRSA), columns(dscore_BKRQA), first)
    dk_BKQE = multiply(slots(dscore_BKRSQ), _heads(saved.queries_BSX, K, E)) * E**-0.5
    dmixed_BSX = put(rows.dmixed_BSX, dmixed_BQX, first)
    dv_BKQE = multiply(slots(columns(saved.weights_BKRSA)), _heads(dmixed_BSX, K, E))
    dk_BKQE, dv_BKQE = (a + cut(b, first, Q) for a, b in zip((dk_BKQE, dv_BKQE), dcache, strict=True))
    dk_BQKE, dv_BQKE = (jnp.swapaxes(a, 1, 2).astype(dtype) for a in (dk_BKQE, dv_BKQE))
    return (dq_BQKRE.reshape(B, Q, -1, E).astype(dtype), dk_BQKE, dv_BQKE), dscore_BKRQA


def _heads(a_BSX, K: int, E: int):
  """[B, K, H / K S, E] of [B, S, H E]: the query heads of a key-value head one after another."""
  B, S, _ = a_BSX.shape
  return jnp.moveaxis(a_BSX.reshape(B, S, K, -1, E), 1, 3).reshape(B, K, -1, E)


def _parameters(spec, params, facts, made, saved, rows, dx_BSD, scales):
  """The gradient of all parameters: matrices over all slots, what makes think tokens over all of those."""
  flat = lambda a_BSX: a_BSX.reshape(-1, a_BSX.shape[-1])

  def matrices(_, saved, rows):
    pairs = {name: (flat(saved.inputs[FIRST[name]]), flat(rows.outputs[name])) for name in FIRST}
    return None, {name: jnp.dot(x.T, dy, preferred_element_type=jnp.float32) for name, (x, dy) in pairs.items()}

  dnorms, dfinal = scales
  over_rows = lambda a: jnp.sum(a, axis=tuple(range(1, a.ndim - 1)))
  dlayers = stacked(sweep(matrices, None, saved, rows)[1]) | jax.tree.map(over_rows, stacked(dnorms))
  shape, n = spec.shape, spec.config.length
  others = {name: leaf for name, leaf in params.items() if name != "layers"}
  numbers = jnp.array([n - 1, *range(shape.singles)])
  keys_RnB = None
  if facts.ends_RB is not None:
    each_RnB = jnp.stack([facts.ends_RB, *[facts.begins_RB] * shape.singles], axis=1)
    keys_RnB = jax.vmap(fold, (1, 0), 1)(each_RnB, numbers)

  def rounds(a_BSX):
    """[R, n, B, ...]: the think tokens of each round."""
    a = a_BSX.reshape(a_BSX.shape[0], shape.rounds, shape.width, *a_BSX.shape[2:])
    return jnp.moveaxis(jnp.concatenate([a[:, :, :1], a[:, :, shape.joint :]], axis=2), 0, 2)

  def think_tokens(others):
    decoder, config = nnx.merge(spec.graph, others | dict(layers=params["layers"])), spec.thoughts(facts)
    if config.kind_of.discrete:
      return rounds(decoder.embed(made.tokens_BS))
    return config.kind_of.step(decoder, made.sources_RnBD, keys_RnB, config)[0]

  (dothers,) = jax.vjp(think_tokens, others)[1](rounds(dx_BSD))
  dothers["final_norm"]["scale"] += jnp.sum(dfinal["scale"], axis=(0, 1))
  return dothers | dict(layers=dlayers)


def _earlier(saved, rows, past):
  """What the caches of earlier segments receive, in the shape of `past`."""
  if not past:
    return []
  sizes = [jax.tree.leaves(cache)[0].shape[-2] for cache in past]
  P = sum(sizes)

  def one(_, saved, rows, cache):
    (B, K, _, E), dtype = cache.k.shape, cache.k.dtype
    received = lambda a_BKRSA: jnp.moveaxis(a_BKRSA[..., :P], 4, 2).reshape(B, K, P, -1)
    dk_BKPE = multiply(received(rows.dscore_BKRSA), _heads(saved.queries_BSX, K, E)) * E**-0.5
    dv_BKPE = multiply(received(saved.weights_BKRSA), _heads(rows.dmixed_BSX, K, E))
    return None, Cache(dk_BKPE.astype(dtype), dv_BKPE.astype(dtype))

  dcache = sweep(one, None, saved, rows, past[0])[1]
  ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
  return [cut(dcache, end - size, size) for end, size in zip(ends, sizes, strict=True)]
