"""The language-model head over many hidden states, without keeping their logits.

The backward pass recomputes the logits, and large calls go through in chunks, so that memory grows with the chunk and
not with positions x samples x vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero

from thinking_lm import sharding
from thinking_lm.thoughts import report
from thinking_lm.thoughts.mixing import MIXING
from thinking_lm.thoughts.tokens import categorical, entropy_of, log_policy

CHUNK = 2**26
"""Logits that a device holds at once."""


def weight(decoder, config, base_XD, hidden_XD):
  """weight_X of the prediction after a thought, of the hidden states without it and with it."""
  return MIXING[config.mixing].weight(decoder.heads["mix"](base_XD, hidden_XD))


def predict(decoder, config, base_XD, hidden_XD):
  """Logits [..., rows] of the next real token: of `hidden_XD`, or mixed with those of `base_XD`, as the config says."""
  mix = MIXING[config.mixing]
  if mix is None:
    return decoder.logits(hidden_XD)
  return mix.of(weight(decoder, config, base_XD, hidden_XD), decoder.logits(hidden_XD), decoder.logits(base_XD))


def mixed_logp(decoder, config, base_BXD, hidden_BXD, targets_BX):
  """`target_logp` of the prediction after a thought, mixed with the one without it if the config says so."""
  if config.mixing == "none":
    return target_logp(decoder, hidden_BXD, targets_BX)
  one = lambda base, hidden, targets: _score(predict(decoder, config, base, hidden), targets)
  return _chunked(decoder, one, base_BXD, hidden_BXD, targets_BX)


def target_logp(decoder, hidden_BXD, targets_BX):
  """(log p(target), no token is likelier than the target, log p(the likeliest)) of each hidden state, shape [B, ...].

  float32 nats, bool, and nats again. Of a model with a verdict head, targets are labels: log p(1) = log sigma(x).
  """
  if "verdict" in decoder.heads:
    x_BX = decoder.heads["verdict"](hidden_BXD)
    for_BX = jnp.where(targets_BX == 1, x_BX, -x_BX)
    return jax.nn.log_sigmoid(for_BX), for_BX > 0, jax.nn.log_sigmoid(jnp.abs(x_BX))
  return _chunked(decoder, lambda hidden, targets: _score(decoder.logits(hidden), targets), hidden_BXD, targets_BX)


def entropy(decoder, hidden_BXD):
  """Entropy of the next real token's distribution at each hidden state, float32 nats [B, ...]."""
  return _chunked(decoder, lambda hidden: entropy_of(decoder.logits(hidden)), hidden_BXD)


def _score(logits, targets):
  logp, _, top = categorical(logits, targets)
  return logp, logp >= top, top  # equal if it is the likeliest, to rounding; an argmax would cost a fifth of a step


def several_logp(decoder, config, base_BXD, hidden_BXD, tokens_BXI):
  """log p(token) of several tokens after each thought, as `mixed_logp` predicts; float32 nats, [B, ..., I]."""

  def one(base, hidden, tokens):
    logits = predict(decoder, config, base, hidden)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens, axis=-1)

  return _chunked(decoder, one, base_BXD, hidden_BXD, tokens_BXI)


def score(decoder, config, hidden_XD, input_XD, token_X, role_X):
  """(log pi, entropy) of think tokens, nats [...]: of the kind (`tokens.KINDS`), or of a report's, by their roles."""
  if config.report:
    return report.policy(decoder, hidden_XD, token_X, role_X, config)
  return config.kind_of.policy(decoder, hidden_XD, input_XD, token_X, config)


def policy(decoder, config, hidden_BXD, thoughts, known=None):
  """`score` of the think token that follows each hidden state [B, ..., n, D].

  Args:
    known: it, if it was computed when the tokens were drawn: the gradient alone goes through the logits then.
  """
  role_X = report.roles(thoughts.tokens_BGNJ, config, decoder.stop) if config.report else thoughts.tokens_BGNJ
  graph, params = nnx.split(decoder)
  drawn = (thoughts.inputs_BGNJD, thoughts.tokens_BGNJ, role_X)
  if known is None:
    return _policy(graph, config, params, hidden_BXD, drawn)
  return _known_policy(graph, config, params, hidden_BXD, drawn, known)


def _policy(graph, config, params, hidden_BXD, drawn, wanted=(True, True)):
  """`score`, or None in the place of what is not wanted."""
  decoder = nnx.merge(graph, params)
  one = lambda *given: [a if want else None for a, want in zip(score(decoder, config, *given), wanted, strict=True)]
  return tuple(_chunked(decoder, one, hidden_BXD, *drawn))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _known_policy(graph, config, params, hidden_BXD, drawn, known):
  """`known`, as the function of `params` and `hidden` that it is."""
  del graph, config, params, hidden_BXD, drawn
  return known


def _known_forward(graph, config, params, hidden_BXD, drawn, known):
  del graph, config
  params, hidden_BXD, drawn, known = jax.tree.map(lambda a: a.value, (params, hidden_BXD, drawn, known))
  return known, (params, hidden_BXD, drawn)


def _known_backward(graph, config, saved, cotangent):
  """Without the entropy's part where nothing pays for it: it would read and write the logits twice more."""
  params, hidden_BXD, drawn = saved
  wanted = tuple(not isinstance(a, SymbolicZero) for a in cotangent)
  one = lambda params, hidden_BXD: _policy(graph, config, params, hidden_BXD, drawn, wanted)
  cotangent = tuple(a if want else None for a, want in zip(cotangent, wanted, strict=True))
  return *jax.vjp(one, params, hidden_BXD)[1](cotangent), None, None


_known_policy.defvjp(_known_forward, _known_backward, symbolic_zeros=True)


def token_policy(decoder, config, hidden_BXD, tokens_BX):
  """(log pi, entropy) of real tokens that are drawn at the policy's temperature, nats [B, ...]."""
  one = lambda hidden, tokens: log_policy(decoder.logits(hidden), tokens, config.temperature)
  return _chunked(decoder, one, hidden_BXD, tokens_BX)


def _chunk(B: int, rows: int) -> int:
  """States of each of B rows whose logits, over so many rows of the table, are held at once."""
  states = max(1, CHUNK * sharding.ways("vocab") // rows)
  return max(1, states * sharding.ways("batch") // B) * sharding.ways("length")


def _chunked(decoder, function, hidden_BXD, *others):
  """function over the states of all rows, rematerialised, at most CHUNK logits of a device at a time.

  A chunk holds states of every row, and from the whole length of each, so that what is split between devices stays
  where it is. The other arrays have the axes [B, ...] of the states, and any after them; so may the results.
  """
  leading = hidden_BXD.shape[:-1]
  flat = [a.reshape(leading[0], -1, *a.shape[len(leading) :]) for a in (hidden_BXD, *others)]
  B, X = flat[0].shape[:2]
  chunk = _chunk(B, decoder.embedding.shape[0])
  function = jax.checkpoint(function)
  if chunk >= X:
    results = function(*(_split(a, 0) for a in flat))
  else:
    pad = lambda a: jnp.pad(a, [(0, 0), (0, -X % chunk)] + [(0, 0)] * (a.ndim - 2))
    cut = lambda a: jnp.moveaxis(pad(a).reshape(B, chunk, -1, *a.shape[2:]), 2, 0)
    results = jax.lax.map(lambda part: function(*part), [_split(cut(a), 1) for a in flat])
    results = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 2).reshape(B, -1, *a.shape[3:])[:, :X], results)
  return jax.tree.map(lambda a: a.reshape(*leading, *a.shape[2:]), results)


def _split(a, first: int):
  """The array with rows and states, its axes `first` and `first + 1`, where the batch's are."""
  return sharding.constrain(a, *[None] * first, "batch", "length", *[None] * (a.ndim - first - 2))
