"""Thinkers that are tables: all of their thoughts are known, and their traces are made without a model.

A trace of these has one anchor and one target a row, like a private thought of one anchor that looks one token ahead,
so that the project's own objectives can be put over it.
"""

import jax
import jax.numpy as jnp

from thinking_lm.types import Thoughts, Trace


def trace(policy_logp_BG, outcome_BG, tokens_BG, relaxed_BG=None) -> Trace:
  """The trace of thoughts with these log-probabilities and outcomes; what a table does not know is 0."""
  B, G = outcome_BG.shape
  one = lambda a: None if a is None else a[:, :, None]
  return Trace(
    logp_BGT=one(outcome_BG),
    hit_BGT=jnp.zeros((B, G, 1), bool),
    weights_BT=jnp.ones((B, 1)),
    base_logp_BT=None,
    ahead_logp_BGNA=None,
    ahead_weights_BNA=None,
    outcome_BGN=one(outcome_BG),
    policy_logp_BGN=one(policy_logp_BG),
    entropy_BGN=jnp.zeros((B, G, 1)),
    valid_BN=jnp.ones((B, 1), bool),
    used_BGN=jnp.ones((B, G, 1), jnp.int32),
    thoughts=Thoughts(jnp.zeros((B, G, 1, 1, 0)), tokens_BG[:, :, None, None]),
    unit_BN=jnp.zeros((B, 1), jnp.int32),
    free_BT=jnp.zeros((B, 1)),
    unit_BT=jnp.zeros((B, 1), jnp.int32),
    relaxed_BGN=one(relaxed_BG),
    outcome_hit_BGN=jnp.zeros((B, G, 1), bool),
  )


def straight_through(logits_XV, key, temperature: float = 1.0):
  """One-hot draws of softmax(logits), relaxed backward: what `thoughts.tokens.gumbel` does to a mixture."""
  perturbed_XV = logits_XV + jax.random.gumbel(key, logits_XV.shape)
  relaxed_XV = jax.nn.softmax(perturbed_XV / temperature)
  hard_XV = jax.nn.one_hot(jnp.argmax(perturbed_XV, axis=-1), logits_XV.shape[-1])
  return hard_XV + relaxed_XV - jax.lax.stop_gradient(relaxed_XV)
