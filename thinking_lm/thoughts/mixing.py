"""How the predictions after a private thought and without it become one (the mixing head of Quiet-STaR, 2403.09629).

A weight, which a head reads off both hidden states, says how much the thought is trusted. Each way is a pure function
(weight_X, think_XV, base_XV) -> logp_XV of the weight and of the float32 logits with the thought and without.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


def probability(weight_X, think_XV, base_XV):
  """log(w p_think + (1 - w) p_base): the mixture of two distributions. Never below log(1 - w) + log p_base."""
  after_XV = jnp.log(weight_X)[..., None] + jax.nn.log_softmax(think_XV)
  return jnp.logaddexp(after_XV, jnp.log1p(-weight_X)[..., None] + jax.nn.log_softmax(base_XV))


def logit(weight_X, think_XV, base_XV):
  """log softmax(w think + (1 - w) base): of logits, a geometric mixture while w is in [0, 1]."""
  weight_X1 = weight_X[..., None]
  return jax.nn.log_softmax(weight_X1 * think_XV + (1 - weight_X1) * base_XV)


def unbounded(x_X):
  """The head's number itself: 0 at initialisation, when nothing that was thought is read yet."""
  return x_X


class Mix(NamedTuple):
  """A member of the table. of: see above. weight: what the head says -> the weight; a sigmoid starts at a half."""

  of: Callable
  weight: Callable = jax.nn.sigmoid


MIXING = dict(none=None, probability=Mix(probability), logit=Mix(logit, unbounded))
"""none: the prediction after the thought alone. probability: the one to switch on, and what the recipes take; a bad
thought costs at most -log(1 - w) nats. logit: the original one, whose weight and losses nothing bounds.
"""
