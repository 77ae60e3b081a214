"""Relaxed samples: what a drawn token would be, were it a little of every token; for control variates.

A token is the largest of z = log pi + Gumbel noise. REBAR (Tucker et al. 2017, arXiv:1703.07370) subtracts from the
score term of a reward f the same for a smooth c, and puts it back by reparametrisation:

    grad E f = E[ (f(token) - c(z')) grad log pi(token)  +  grad c(z) - grad c(z') ]

where z' is z given the token. Drawn with common random numbers, z = z', so that c is evaluated once: only the two ways
in which a draw depends on log pi differ. c may have any weight; what makes the variance least is found by trying
(objective.control below 1 and thought.relaxation above 1 did best on small models; 1 and 0.5 did worse than nothing).
REBAR's c is the reward of the relaxed thought; RELAX (Grathwohl et al. 2018) learns one (`objectives/variates.py`).
"""

import jax
import jax.numpy as jnp


def noise(keys_X, V: int):
  """log e_XV, logarithms of standard exponentials."""
  e_XV = jax.vmap(lambda key: jax.random.exponential(key, (V,)))(keys_X.reshape(-1))
  return jnp.log(e_XV).reshape(*keys_X.shape, V)


def coupled(logp_XV, token_X, log_e_XV):
  """z_XV, a draw of log pi + Gumbel noise whose largest entry is `token`; its gradient is that of z less that of z'.

  z depends on log pi as a sum; z' by truncation: with standard exponentials e, -log e_k is the largest and
  -log(e_k + e_i / pi_i) are the others (Tucker et al., appendix C; Grathwohl et al. 2018, arXiv:1711.00123, B.2).
  """
  mine_X1 = jnp.take_along_axis(log_e_XV, token_X[..., None], axis=-1)
  others_XV = -jnp.logaddexp(mine_X1, log_e_XV - logp_XV)
  given_XV = jnp.where(jnp.arange(logp_XV.shape[-1]) == token_X[..., None], -mine_X1, others_XV)
  free_XV = logp_XV + jax.lax.stop_gradient(given_XV - logp_XV)
  return jax.lax.stop_gradient(given_XV) + free_XV - given_XV


def weights(z_XV, temperature: float):
  """The relaxed token, softmax(z / temperature): hard as the temperature falls."""
  return jax.nn.softmax(z_XV / temperature)
