"""Thoughts that a head ends: expectations over the exit, which need no sampling (PonderNet, arXiv:2107.05407).

    maximised = sum_k p_k log p(y | x, z_1..k)  -  price x sum_k p_k k  -  halt_weight x KL(p || prior)

with p the stop distribution over the exits (types.Trace). The prior is a geometric distribution whose rest is in the
last exit, as p's is. All of it is differentiable, through p and through the predictions. With sampled think tokens the
same, as their reward, makes the score term the other half of the gradient of its expectation over them.
"""

import jax.numpy as jnp


def settled(trace):
  """The trace with each thought's outcome and think tokens replaced by their expectations over its exits."""
  if trace.exit_logp_BGNK is None:
    return trace
  exit_BGNK = jnp.exp(trace.exit_logp_BGNK) * trace.valid_BN[:, None, :, None]
  return trace.replace(
    outcome_BGN=jnp.sum(exit_BGNK * trace.exit_outcome_BGNK, axis=-1),
    used_BGN=jnp.sum(exit_BGNK * trace.exit_length_K, axis=-1),
  )


def divergence(trace, prior: float):
  """KL(p || geometric(prior)) of each thought, nats [B, G, N]; 0 where invalid."""
  logp_BGNK = trace.exit_logp_BGNK
  K = logp_BGNK.shape[-1]
  log_prior_K = jnp.arange(K) * jnp.log1p(-prior) + jnp.where(jnp.arange(K) < K - 1, jnp.log(prior), 0.0)
  kl_BGN = jnp.sum(jnp.exp(logp_BGNK) * (logp_BGNK - log_prior_K), axis=-1)
  return jnp.where(trace.valid_BN[:, None], kl_BGN, 0.0)


def value(trace, price: float, weight: float, prior: float):
  """What is maximised, summed over targets, mean over samples. Nats."""
  settled_trace = settled(trace)
  gain_BGN = settled_trace.outcome_BGN - price * settled_trace.used_BGN
  if weight:
    gain_BGN -= weight * divergence(trace, prior)
  return jnp.sum(trace.logp_BGT.mean(axis=1) * trace.free_BT) + jnp.sum(gain_BGN.mean(axis=1))
