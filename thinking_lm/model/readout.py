"""The language-model head over many hidden states, without keeping their logits.

The backward pass recomputes the logits, and large calls go through in chunks, so that memory grows with the chunk and
not with positions x samples x vocabulary.
"""

import jax
import jax.numpy as jnp

CHUNK = 8192
"""Hidden states whose logits exist at once."""


def target_logp(decoder, hidden_XD, targets_X):
  """(log p(target), target is the most likely token) of each hidden state; float32 nats and bool, shape [...]."""

  def one(hidden, targets):
    logits = decoder.logits(hidden)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

  return _chunked(one, hidden_XD, targets_X)


def policy(decoder, config, hidden_XD, thoughts):
  """(log pi, entropy) of the think token that follows each hidden state, nats; of the kind, see `tokens.KINDS`."""
  return _chunked(
    lambda h, x, z: config.kind_of.policy(decoder, h, x, z, config),
    *(hidden_XD, thoughts.inputs_BGNJD, thoughts.tokens_BGNJ),
  )


def _chunked(function, *arrays):
  """function over the flattened leading axes, rematerialised, at most CHUNK states at a time.

  The last array has no axes but these; the others have one more.
  """
  leading = arrays[-1].shape
  flat = [a.reshape(-1, *a.shape[len(leading) :]) for a in arrays]
  function = jax.checkpoint(function)
  count = len(flat[0])
  if count <= CHUNK:
    results = function(*flat)
  else:
    pad = -count % CHUNK
    split = lambda a: jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)).reshape(-1, CHUNK, *a.shape[1:])
    results = jax.lax.map(lambda chunk: function(*chunk), [split(a) for a in flat])
    results = jax.tree.map(lambda a: a.reshape(-1)[:count], results)
  return jax.tree.map(lambda a: a.reshape(leading), results)
