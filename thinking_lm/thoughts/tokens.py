"""WHAT a think token is: the kinds.

Each kind is a pure function of the hidden state before the token:

    kind(model, hidden_XD, keys_X, config) -> (input_XD, token_X)

`input_XD` is fed to the decoder as the next think token; `token_X` is its id, -1 where there is none. `model` offers
`logits`, `embed`, `mix` and `feedback`. `keys_X` are random keys, one for each of the X thoughts. A kind that a policy
gradient can train also has the log-density of what it draws:

    policy(model, hidden_XD, input_XD, token_X, config) -> (log pi_X, entropy_X)     nats
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def fold(keys_X, i):
  """Random keys of think token i, one number or one each, from those of thoughts, of any shape; None if they are."""
  if keys_X is None:
    return None
  one = jax.random.fold_in
  for _ in range(keys_X.ndim):
    one = jax.vmap(one)
  return one(keys_X, jnp.broadcast_to(i, keys_X.shape))


def pause(model, hidden_XD, keys_X, config):
  """One learned embedding, whatever came before (Goyal et al. 2023, arXiv:2310.02226)."""
  del keys_X, config
  shape = hidden_XD.shape[:-1]
  return model.embed_row(model.pause, *shape), jnp.full(shape, -1)


def latent(model, hidden_XD, keys_X, config):
  """The normalised last hidden state, fed back (Coconut, Hao et al. 2024, arXiv:2412.06769)."""
  del keys_X, config
  return model.feedback(hidden_XD), jnp.full(hidden_XD.shape[:-1], -1)


def soft(model, hidden_XD, keys_X, config):
  """The mean embedding under softmax(logits / temperature), of the top_k tokens if set (CoT2, arXiv:2505.23648)."""
  del keys_X
  logits_XV = model.logits(hidden_XD)
  if config.top_k:
    smallest = jax.lax.top_k(logits_XV, min(config.top_k, logits_XV.shape[-1]))[0][..., -1:]
    logits_XV = jnp.where(logits_XV >= smallest, logits_XV, -1e30)
  weights_XV = jax.nn.softmax(logits_XV / config.temperature).astype(hidden_XD.dtype)
  return model.mix(weights_XV), jnp.argmax(logits_XV, axis=-1)


def noisy(model, hidden_XD, keys_X, config):
  """A soft token plus Gaussian noise of standard deviation `config.noise` in each dimension: an action to explore by.

  Soft Tokens, Hard Truths (arXiv:2509.19170). The noise is in units of an input, whose mean square is about 1.
  """
  mean_XD, token_X = soft(model, hidden_XD, None, config)
  noise_XD = jax.vmap(lambda key: jax.random.normal(key, mean_XD.shape[-1:]))(keys_X.reshape(-1)).reshape(mean_XD.shape)
  return mean_XD + (config.noise * noise_XD).astype(mean_XD.dtype), token_X


def gumbel(model, hidden_XD, keys_X, config):
  """Straight-through Gumbel-softmax: a hard token forward, the relaxed one backward (Jang et al. 2016, 1611.01144).

  The token is distributed as softmax(logits) at any temperature: the temperature shapes the gradient only, and a small
  one is not greedy.
  """
  logits_XV = model.logits(hidden_XD)
  noise_XV = jax.vmap(lambda key: jax.random.gumbel(key, logits_XV.shape[-1:]))(keys_X.reshape(-1))
  perturbed_XV = logits_XV + noise_XV.reshape(logits_XV.shape)
  relaxed_XV = jax.nn.softmax(perturbed_XV / config.temperature)
  token_X = jnp.argmax(perturbed_XV, axis=-1)
  hard_XV = jax.nn.one_hot(token_X, logits_XV.shape[-1])
  weights_XV = hard_XV + relaxed_XV - jax.lax.stop_gradient(relaxed_XV)
  return model.mix(weights_XV.astype(hidden_XD.dtype)), token_X


def sampled(model, hidden_XD, keys_X, config):
  """A token drawn from softmax(logits / temperature); the most likely one at temperature 0. STOP, if it may halt."""
  token_X = draw(model.logits(hidden_XD, stop=config.may_stop), keys_X, config.temperature)
  return model.embed(token_X), token_X


ROW = 128
"""Tokens that `draw` looks at one by one: at a large vocabulary, the cumulative sum over all would cost more."""


def draw(logits_XV, keys_X, temperature: float):
  """Token ids drawn from softmax(logits / temperature) by inverting the cumulative distribution, in two levels.

  One uniform number a token finds a row of ROW tokens by their sums, and then the token in it. Gumbel noise for every
  entry would cost several times the logits themselves.
  """
  if temperature == 0:
    return jnp.argmax(logits_XV, axis=-1)
  weights_XV = _weights(logits_XV, temperature)[1]
  sums_XR = _sums(weights_XV)
  uniform_X = jax.vmap(jax.random.uniform)(keys_X.reshape(-1)).reshape(keys_X.shape)
  row_X, rest_X = _invert(sums_XR, uniform_X * sums_XR.sum(axis=-1))
  return row_X * ROW + _invert(_row(weights_XV, row_X), rest_X)[0]


def _weights(logits_XV, temperature: float):
  """(logits below their largest, at the temperature; their exponentials)."""
  shifted_XV = (logits_XV - logits_XV.max(axis=-1, keepdims=True)) / temperature
  return shifted_XV, jnp.exp(shifted_XV)


def _sums(weights_XV):
  """Sums of rows of ROW tokens. To fill the last one up would have all weights written once more."""
  *edge, V = weights_XV.shape
  if V % ROW == 0:
    return weights_XV.reshape(*edge, -1, ROW).sum(axis=-1)
  window = (*[1] * len(edge), ROW)
  fill = [*[(0, 0)] * len(edge), (0, -V % ROW)]
  return jax.lax.reduce_window(weights_XV, np.zeros((), weights_XV.dtype), jax.lax.add, window, window, fill)


def _row(weights_XV, row_X):
  """One row of ROW weights of each X. Whole rows are looked up at once: it is faster, and each is on one device."""
  *edge, V = weights_XV.shape
  if V % ROW == 0:
    return jnp.take_along_axis(weights_XV.reshape(*edge, -1, ROW), row_X[..., None, None], axis=-2)[..., 0, :]
  token_XW = row_X[..., None] * ROW + jnp.arange(ROW)
  return jnp.where(token_XW < V, jnp.take_along_axis(weights_XV, jnp.minimum(token_XW, V - 1), axis=-1), 0)


def _invert(weights_XV, target_X):
  """(first index whose cumulative weight is above the target, what the target is above the weights before it).

  Rounding never chooses an index of weight 0.
  """
  cumulative_XV = jnp.cumsum(weights_XV, axis=-1)
  target_X = jnp.maximum(target_X, 0.0)
  index_X = jnp.sum(cumulative_XV <= target_X[..., None], axis=-1)
  last_X = jnp.max(jnp.where(weights_XV > 0, jnp.arange(weights_XV.shape[-1]), 0), axis=-1)
  index_X = jnp.minimum(index_X, last_X).astype(jnp.int32)
  before_XV = cumulative_XV - weights_XV
  return index_X, target_X - jnp.take_along_axis(before_XV, index_X[..., None], axis=-1)[..., 0]


def log_policy(logits_XV, token_X, temperature: float):
  """(log pi(token), entropy of pi), nats, of the same distribution that `draw` samples from.

  At temperature 0 the policy is a point mass: both are 0.
  """
  if temperature == 0:
    zero_X = jnp.zeros(token_X.shape)
    return zero_X, zero_X
  return categorical(logits_XV, token_X, temperature)[:2]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def categorical(logits_XV, token_X, temperature: float = 1.0):
  """(log p(token), entropy, log p(the likeliest)) of softmax(logits / temperature), nats [...]; the last is a constant.

  Args:
    logits_XV: float [..., V], finite (masked ones far below the others). token_X: int32 [...].
  """
  return _categorical(logits_XV, token_X, temperature)[1:]


@categorical.defjvp
def _categorical_jvp(temperature, primals, tangents):
  """With the gradients written out: of log p(token) onehot - p, of the entropy -p (log p + entropy).

  Automatic differentiation writes an array of the logits' size for the one-hot vectors and another for the sum.
  """
  (logits_XV, token_X), change_XV = primals, tangents[0]
  logp_XV, chosen_X, entropy_X, top_X = _categorical(logits_XV, token_X, temperature)
  p_XV = jnp.exp(logp_XV)
  onehot_XV = jnp.arange(logits_XV.shape[-1]) == token_X[..., None]
  along = lambda gradient_XV: jnp.sum(gradient_XV * change_XV, axis=-1) / temperature
  changes = along(onehot_XV - p_XV), along(-p_XV * (logp_XV + entropy_X[..., None])), jnp.zeros_like(top_X)
  return (chosen_X, entropy_X, top_X), changes


def _categorical(logits_XV, token_X, temperature):
  """log p of every token, then what `categorical` returns."""
  shifted_XV, weights_XV = _weights(logits_XV, temperature)
  total_X = weights_XV.sum(axis=-1)
  log_X = jnp.log(total_X)
  chosen_X = jnp.take_along_axis(shifted_XV, token_X[..., None], axis=-1)[..., 0] - log_X
  entropy_X = log_X - jnp.sum(weights_XV * shifted_XV, axis=-1) / total_X
  return shifted_XV - log_X[..., None], chosen_X, entropy_X, -log_X


def entropy_of(logits_XV):
  """Entropy of softmax(logits) of logits [..., V], nats [...]."""
  return categorical(logits_XV, jnp.zeros(logits_XV.shape[:-1], jnp.int32))[1]


def sampled_policy(model, hidden_XD, input_XD, token_X, config):
  """`log_policy` of the distribution that `sampled` draws from."""
  del input_XD
  return log_policy(model.logits(hidden_XD, stop=config.may_stop), token_X, config.temperature)


def noisy_policy(model, hidden_XD, input_XD, token_X, config):
  """log N(input; soft token, noise^2 I), a density over all D dimensions together; its entropy depends on nothing."""
  del token_X
  mean_XD = soft(model, hidden_XD, None, config)[0]
  D, spread = mean_XD.shape[-1], config.noise
  wide = jnp.promote_types(mean_XD.dtype, jnp.float32)
  scaled_XD = (input_XD.astype(wide) - mean_XD.astype(wide)) / spread
  volume = D * (0.5 * math.log(2 * math.pi) + math.log(spread))
  logp_X = -0.5 * jnp.sum(scaled_XD**2, axis=-1) - volume
  return logp_X, jnp.full(logp_X.shape, volume + 0.5 * D)


class Kind(NamedTuple):
  """A kind and what is true of it.

  step: the function above. stochastic: it draws, so samples differ. serial: each think token needs the hidden state
  before it. weighs: a distribution over real tokens makes it, which the temperature shapes. policy: the log-density
  above, for kinds whose think tokens are actions; None for the others. discrete: these actions are ids, which can be
  enumerated, and STOP can be one.
  """

  step: Callable
  stochastic: bool
  serial: bool
  weighs: bool
  policy: Callable | None = None
  discrete: bool = False


KINDS = dict(
  pause=Kind(pause, stochastic=False, serial=False, weighs=False),
  latent=Kind(latent, stochastic=False, serial=True, weighs=False),
  soft=Kind(soft, stochastic=False, serial=True, weighs=True),
  noisy=Kind(noisy, stochastic=True, serial=True, weighs=True, policy=noisy_policy),
  gumbel=Kind(gumbel, stochastic=True, serial=True, weighs=True),
  sampled=Kind(sampled, stochastic=True, serial=True, weighs=True, policy=sampled_policy, discrete=True),
)
