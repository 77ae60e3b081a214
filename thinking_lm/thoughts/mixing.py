"""How the predictions after a private thought and without it become one (the mixing head of Quiet-STaR, 2403.09629).

A weight in [0, 1], which a head reads off both hidden states, says how much the thought is trusted. Each way is a pure
function (weight_X, think_XV, base_XV) -> logp_XV of the weight and of the float32 logits with the thought and without.
"""

import jax
import jax.numpy as jnp


def probability(weight_X, think_XV, base_XV):
  """log(w p_think + (1 - w) p_base): the mixture of two distributions. Never below log(1 - w) + log p_base."""
  after_XV = jnp.log(weight_X)[..., None] + jax.nn.log_softmax(think_XV)
  return jnp.logaddexp(after_XV, jnp.log1p(-weight_X)[..., None] + jax.nn.log_softmax(base_XV))


def logit(weight_X, think_XV, base_XV):
  """log softmax(w think + (1 - w) base): the geometric mixture, as in Quiet-STaR's code, where w is no sigmoid."""
  weight_X1 = weight_X[..., None]
  return jax.nn.log_softmax(weight_X1 * think_XV + (1 - weight_X1) * base_XV)


MIXING = dict(none=None, probability=probability, logit=logit)
"""none: the prediction after the thought alone. probability: the one to switch on, and what the recipes take. logit:
the original one, but for the weight, which is bounded here.
"""
