"""The language-model head over many hidden states, without keeping their logits.

The backward pass recomputes the logits, and large calls go through in chunks, so that memory grows with the chunk and
not with positions x samples x vocabulary.
"""

import jax
import jax.numpy as jnp

from thinking_lm.thoughts.tokens import log_policy

CHUNK = 8192
"""Hidden states whose logits exist at once."""


def target_logp(decoder, hidden_XD, targets_X):
  """(log p(target), target is the most likely token) of each hidden state; float32 nats and bool, shape [...]."""

  def one(hidden, targets):
    logits = decoder.logits(hidden)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

  return _chunked(one, hidden_XD, targets_X)


def policy(decoder, hidden_XD, tokens_X, temperature: float, stop: bool):
  """(log pi(token), entropy) of the think token that follows each hidden state, nats; see `tokens.log_policy`."""
  return _chunked(lambda h, z: log_policy(decoder.logits(h, stop), z, temperature), hidden_XD, tokens_X)


def _chunked(function, hidden_XD, index_X):
  """function over the flattened leading axes, rematerialised, at most CHUNK states at a time."""
  flat, index = hidden_XD.reshape(-1, hidden_XD.shape[-1]), index_X.reshape(-1)
  function = jax.checkpoint(function)
  count = flat.shape[0]
  if count <= CHUNK:
    results = function(flat, index)
  else:
    pad = -count % CHUNK
    flat = jnp.pad(flat, ((0, pad), (0, 0))).reshape(-1, CHUNK, flat.shape[-1])
    index = jnp.pad(index, (0, pad)).reshape(-1, CHUNK)
    results = jax.lax.map(lambda pair: function(*pair), (flat, index))
    results = jax.tree.map(lambda a: a.reshape(-1)[:count], results)
  return jax.tree.map(lambda a: a.reshape(index_X.shape), results)
