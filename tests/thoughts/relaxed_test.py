"""Relaxed samples: their distribution given a token, and the identity that a control variate rests on."""

import jax
import jax.numpy as jnp
import numpy as np

from thinking_lm.thoughts import relaxed

LOGITS_V = jnp.array([0.4, -1.1, 0.9])
LOGP_V = jax.nn.log_softmax(LOGITS_V)
COUNT = 100_000
NOISE_XV = relaxed.noise(jax.random.split(jax.random.key(0), COUNT), 3)
FREE_XV = np.asarray(LOGP_V + jax.random.gumbel(jax.random.key(1), (COUNT, 3)))
"""Draws of log pi + Gumbel noise as their definition says."""


def given(token, logp_V=LOGP_V):
  return relaxed.coupled(jnp.broadcast_to(logp_V, (COUNT, 3)), jnp.full(COUNT, token), NOISE_XV)


def test_the_token_is_the_largest_and_the_rest_is_distributed_as_given_it():
  for token in range(3):
    z_XV = np.asarray(given(token))
    assert (z_XV.argmax(axis=1) == token).all()
    same_XV = FREE_XV[FREE_XV.argmax(axis=1) == token]
    for of in (lambda z: z, lambda z: z**2, lambda z, k=token: np.tanh(z - z[:, [k]])):
      error = np.sqrt(of(z_XV).var(axis=0) / COUNT + of(same_XV).var(axis=0) / len(same_XV))
      assert (np.abs(of(z_XV).mean(axis=0) - of(same_XV).mean(axis=0)) < 5 * error + 1e-6).all()


def test_the_gradient_is_that_of_the_free_draw_less_that_of_the_one_given_the_token():
  """E [c(z') grad log pi(token)] + E [grad c(z) - grad c(z')] = 0... for c(z): grad E c(z) both ways."""
  c = lambda z_XV: jnp.sin(relaxed.weights(z_XV, 0.7) @ jnp.array([1.0, -2.0, 0.5]))

  def score_less_path(logits_V, token):
    """Of each draw: c grad log pi(token), which grad c(z) - grad c(z') must make up for."""
    logp_V = jax.nn.log_softmax(logits_V)
    c_X = c(given(token, logp_V))
    return jnp.exp(jax.lax.stop_gradient(logp_V[token])) * (jax.lax.stop_gradient(c_X) * logp_V[token] - c_X)

  each = [jax.jacfwd(lambda logits_V, k=token: score_less_path(logits_V, k))(LOGITS_V) for token in range(3)]
  total_X3, score_3 = np.asarray(sum(each), np.float64), np.zeros(3)
  error = total_X3.std(axis=0) / COUNT**0.5
  assert (np.abs(total_X3.mean(axis=0)) < 5 * error).all(), (total_X3.mean(axis=0), error)
  for token in range(3):
    mean_c = float(c(given(token)).mean())
    score_3 += np.exp(LOGP_V[token]) * mean_c * (np.eye(3)[token] - np.exp(LOGP_V))
  assert np.abs(score_3).max() > 50 * error.max(), "there is something to make up for"


def test_masked_tokens_stay_out():
  logp_V = jax.nn.log_softmax(jnp.array([0.4, -1.1, -1e30]))
  z_XV, slopes = jax.value_and_grad(lambda logp: relaxed.weights(given(0, logp), 0.5)[:, 0].sum())(logp_V)
  assert np.isfinite(z_XV) and np.isfinite(slopes).all()
  assert not np.asarray(relaxed.weights(given(0, logp_V), 0.5))[:, 2].any()
