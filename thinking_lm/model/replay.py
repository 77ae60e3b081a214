"""Private thoughts that are drawn once: the pass that draws them also scores them.

Drawn think tokens are constants, so that no gradient flows *through* drawing. The drawing pass, one slot after the
other, keeps the input of every layer; the gradient is then that of one parallel pass over all slots of all thoughts and
their shared prefix, which is never run forward: `replay` goes through it backwards, one layer at a time, from the
inputs that were kept. Compared with drawing first and scoring in a second pass, a forward pass is saved; memory is that
of a plain step that keeps layer inputs only, and neither compile time nor the program grows with n or the layers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from thinking_lm.model import readout
from thinking_lm.model.attention import Keys, attention
from thinking_lm.model.decoder import ACTIVATIONS, DTYPES, Cache, Decoder, Seen
from thinking_lm.model.segment import whole
from thinking_lm.model.thinking import emit, think
from thinking_lm.sharding import constrain
from thinking_lm.thoughts import report


class Pass(NamedTuple):
  """One parallel pass over the real tokens of each row and X slots of P thoughts: where they stand, whom they see."""

  positions_B1T: jax.Array
  mask_B1TT: jax.Array
  positions_BPX: jax.Array
  mask_BPXX: jax.Array
  prefix_BP1T: jax.Array

  def past(self, prefix: Cache) -> Seen:
    """The keys of the real tokens [L, B, 1, T, K, E], as the thoughts see them."""
    return Seen(Cache(prefix.k[:, :, 0], prefix.v[:, :, 0]), self.prefix_BP1T)


class Draft(NamedTuple):
  """What drawing leaves in P streams of J slots, written in place one slot at a time.

  k, v: keys and values, as batches of small matrices. inputs: of every layer. end: after the last layer. logp, entropy:
  of the policy that the n think tokens were drawn from.
  """

  k_LBKPJE: jax.Array
  v_LBKPJE: jax.Array
  inputs_LJBPD: jax.Array
  end_JBPD: jax.Array
  logp_nBP: jax.Array
  entropy_nBP: jax.Array

  @property
  def cache(self) -> Cache:
    """Keys and values of each stream."""
    return Cache(*(a.transpose(0, 1, 3, 4, 2, 5) for a in self[:2]))


class Kept(NamedTuple):
  """Inputs of every layer: of the real tokens, the think slots, and the look-ahead tokens if there are any."""

  base_LB1TD: jax.Array
  think_LJBPD: jax.Array
  ahead_LBPAD: jax.Array | None


def draw(decoder: Decoder, config, x_B1TD, gather, positions_BPX, keys_BP, facts: Pass):
  """Runs the real tokens, and draws the thoughts.

  Args:
    decoder: with parameters that no gradient is wanted of. gather: hidden_B1TD -> hidden_BPD of the anchors.
    facts: `mask_BPXX` is not read.

  Returns:
    (Thoughts [B, P, ...], end_B1TD of the real tokens, their Cache, their inputs of every layer, Draft).
  """
  decoder = whole(decoder)
  end_B1TD, prefix, base_LB1TD = decoder.layered(x_B1TD, facts.positions_B1T, facts.mask_B1TT)
  anchor_BPD = gather(decoder.final_norm(end_B1TD))
  (B, P, D), J, c = anchor_BPD.shape, config.slots, decoder.config
  L, K, E, dtype = c.layers, c.resolved_kv_heads, c.resolved_head_width, DTYPES[c.compute_dtype]
  empty = lambda *shape: jnp.zeros(shape, dtype)
  slots = (empty(L, B, K, P, J, E), empty(L, B, K, P, J, E), empty(L, J, B, P, D), empty(J, B, P, D))
  draft = Draft(*slots, *(jnp.zeros((config.length, B, P), jnp.float32) for _ in range(2)))
  make = functools.partial(_make, decoder, config)
  heads_first = Cache(*(jnp.moveaxis(a[:, :, 0], -2, 2) for a in prefix))
  run = functools.partial(_slot, decoder, heads_first, facts.prefix_BP1T, positions_BPX)
  _, thoughts, draft = think(decoder, config, anchor_BPD, None, keys_BP, None, None, run=run, memory=draft, make=make)
  return thoughts, end_B1TD, prefix, base_LB1TD, draft


def _make(decoder, config, hidden_BPD, keys_BP, i, progress, draft: Draft):
  """(input_BPD, token_BP) of think token i, and the draft with its score (XLA computes the logits of both once)."""
  x_BPD, token_BP = emit(decoder, config, hidden_BPD, keys_BP, i, progress)
  role_BP = report.role(i, progress.first_X, config) if config.report else None
  scores = readout.score(decoder, config, hidden_BPD, x_BPD, token_BP, role_BP)
  put = lambda a_nBP, b_BP: jax.lax.dynamic_update_index_in_dim(a_nBP, b_BP, i, axis=0)
  logp_nBP, entropy_nBP = map(put, (draft.logp_nBP, draft.entropy_nBP), scores)
  return x_BPD, token_BP, draft._replace(logp_nBP=logp_nBP, entropy_nBP=entropy_nBP)


def _slot(decoder, past: Cache, prefix_BP1T, positions_BPX, x_BPD, j, draft: Draft):
  """One slot of every thought through all layers: (hidden_BPD, the draft with it)."""
  graph, layers = nnx.split(decoder.layers)
  turn = decoder.layers.turn(jax.lax.dynamic_index_in_dim(positions_BPX, j, axis=2, keepdims=False))

  def body(carry, scanned):
    (x, draft), (number, params, past) = carry, scanned
    layer = nnx.merge(graph, params)
    q, k, v = layer.project(x, turn)
    put = lambda a, b: jax.lax.dynamic_update_slice(a, b.swapaxes(1, 2)[None, ..., None, :], (number, 0, 0, 0, j, 0))
    keys = [put(a, b) for a, b in zip(draft[:2], (k, v), strict=True)]
    inputs = jax.lax.dynamic_update_slice(draft.inputs_LJBPD, x[None, None], (number, j, 0, 0, 0))
    own = [jax.lax.dynamic_index_in_dim(a, number, keepdims=False) for a in keys]
    mixed = _attend(decoder.config, q, past, prefix_BP1T, Cache(*own), j)
    draft = draft._replace(k_LBKPJE=keys[0], v_LBKPJE=keys[1], inputs_LJBPD=inputs)
    return (constrain(layer.complete(x, mixed), "batch", "streams", None), draft), None

  numbers = jnp.arange(decoder.config.layers)
  (x, draft), _ = jax.lax.scan(body, (x_BPD, draft), (numbers, layers, past))
  draft = draft._replace(end_JBPD=jax.lax.dynamic_update_index_in_dim(draft.end_JBPD, x, j, axis=0))
  return decoder.final_norm(x), draft


def _attend(config, q_BPHE, past: Cache, prefix_BP1T, own: Cache, j):
  """Attention of one slot in each stream: past keys [B, K, T, E], own keys [B, K, P, J, E] up to slot j.

  Both are kept as attention has them inside: a loop would move the heads of all of them in each trip, and moved there
  and back here they stay.
  """
  up_to = (jnp.arange(own.k.shape[3]) <= j)[None, None, None]
  heads_last = lambda cache: (jnp.moveaxis(a, 1, -2) for a in cache)
  sets = [Keys(*heads_last(past), prefix_BP1T), Keys(*heads_last(own), up_to)]
  return attention(q_BPHE[:, :, None], sets, config.attention, chunk=config.attention_chunk)[:, :, 0]


def ahead(decoder: Decoder, x_BPAD, live_BPJ, facts: Pass, prefix: Cache, draft: Draft):
  """Runs the look-ahead tokens after the thoughts: (end_BPAD, their inputs of every layer)."""
  A = x_BPAD.shape[2]
  own, mask = Seen(draft.cache, live_BPJ[:, :, None]), facts.mask_BPXX[:, :, -A:, -A:]
  end, _, inputs = decoder.layered(x_BPAD, facts.positions_BPX[:, :, -A:], mask, facts.past(prefix), own)
  return end, inputs


def replayed(decoder: Decoder, base_B1TD, slots_BPXD, facts: Pass, kept: Kept, ends):
  """The hidden states (hidden_B1TD, hidden_BPXD) of a pass whose results `ends` are known, with its gradient.

  Args:
    base_B1TD, slots_BPXD: inputs of the real tokens and of the thoughts with their look-ahead, which gradients go to.
    kept, ends: inputs of every layer and what came out of the last one, as they were when drawn; constants.
  """
  graph, layers = nnx.split(decoder.layers)
  ends = replay(graph, layers, (base_B1TD, slots_BPXD), facts, kept, ends)
  return tuple(decoder.final_norm(end) for end in ends)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def replay(graph, layers, inputs, facts, kept, ends):
  """`ends`, as the function of `layers` and `inputs` that it is."""
  del graph, layers, inputs, facts, kept
  return ends


def _forward(graph, layers, inputs, facts, kept, ends):
  del graph, inputs
  return ends, (layers, facts, kept)


def _backward(graph, saved, cotangents):
  layers, facts, kept = saved
  turns = jax.tree.map(nnx.merge(graph, layers).turn, (facts.positions_B1T, facts.positions_BPX))

  def layer(cotangents, scanned):
    params, (base_B1TD, think_JBPD, ahead_BPAD) = scanned
    slots = jnp.moveaxis(think_JBPD, 0, 2)
    if ahead_BPAD is not None:
      slots = jnp.concatenate([slots, ahead_BPAD], axis=2)
    pull = jax.vjp(functools.partial(_layer, graph, facts, turns), params, (base_B1TD, slots))[1]
    gradient, inputs = pull(cotangents)
    return inputs, gradient

  inputs, gradient = jax.lax.scan(layer, cotangents, (layers, kept), reverse=True)
  return gradient, inputs, None, None, None


replay.defvjp(_forward, _backward)


def _layer(graph, facts: Pass, turns, params, inputs):
  """One layer of the parallel pass: the thoughts see what the layer makes of the real tokens."""
  layer, (base, slots) = nnx.merge(graph, params), inputs
  base, (k, v) = layer(base, turns[0], facts.mask_B1TT, ())
  past = Keys(k[:, 0], v[:, 0], facts.prefix_BP1T)
  slots, _ = layer(slots, turns[1], facts.mask_BPXX, [past])
  return constrain(base, *ACTIVATIONS), constrain(slots, *ACTIVATIONS)
