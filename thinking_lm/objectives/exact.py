"""Exact expectations over thoughts: a Trace of all of them becomes one of a single sample that is their expectation.

Its values under the bounds J, M and P are then the bounds themselves, and nothing is left to estimate in their
gradients: both terms, score and NLL, are in them.
"""

import jax
import jax.numpy as jnp

from thinking_lm.types import Trace


def log_weight(trace: Trace):
  """log_weight_BGN: log-probability of what sample g thinks in the unit of thought n; over g these sum to 1.

  A row of persistent thoughts holds other documents' too, so that each way to think in a unit is there several times,
  as often as any other: its probability is split among them.
  """
  mine_BMN = (trace.unit_BN[:, :, None] == trace.unit_BN[:, None, :]) & trace.valid_BN[:, :, None]
  joint_BGN = jnp.einsum("bgm,bmn->bgn", trace.policy_logp_BGN, mine_BMN.astype(jnp.float32), precision="highest")
  return joint_BGN - jax.lax.stop_gradient(jax.nn.logsumexp(joint_BGN, axis=1, keepdims=True))


def marginal(trace: Trace) -> Trace:
  """The expectation of a trace whose samples are all thoughts, as a trace with G = 1.

  logp, hit, ahead_logp, entropy, used, mix and outcome_hit are means under the policy (so that hit, used and
  outcome_hit need not be whole numbers). outcome is log E p(y | x, z), the log-marginal of all that a thought can
  change: bound M is a sum of these, bound P of their exponentials, and J the sum of the mean log-probabilities.
  """
  if not trace.valid_BN.shape[1]:
    return trace
  log_BGN = log_weight(trace)
  weight_BGN = jnp.exp(log_BGN)
  G, N = weight_BGN.shape[1:]
  index_BGT = jnp.broadcast_to(jnp.minimum(trace.unit_BT, N - 1)[:, None], trace.logp_BGT.shape)
  weight_BGT = jnp.where((trace.unit_BT < N)[:, None], jnp.take_along_axis(weight_BGN, index_BGT, axis=2), 1 / G)
  mean = lambda weight, a: jnp.sum(weight * a, axis=1, keepdims=True)
  ahead = trace.ahead_logp_BGNA
  return trace.replace(
    logp_BGT=mean(weight_BGT, trace.logp_BGT),
    hit_BGT=mean(weight_BGT, trace.hit_BGT),
    ahead_logp_BGNA=None if ahead is None else mean(weight_BGN[..., None], ahead),
    outcome_BGN=jax.nn.logsumexp(log_BGN + trace.outcome_BGN, axis=1, keepdims=True),
    policy_logp_BGN=jnp.zeros_like(log_BGN[:, :1]),
    entropy_BGN=mean(weight_BGN, trace.entropy_BGN),
    used_BGN=mean(weight_BGN, trace.used_BGN),
    thoughts=jax.tree.map(lambda a: a[:, :1], trace.thoughts),
    outcome_hit_BGN=mean(weight_BGN, trace.outcome_hit_BGN),
    mix_BGN=None if trace.mix_BGN is None else mean(weight_BGN, trace.mix_BGN),
  )
