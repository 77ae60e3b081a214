"""Which expectation over thoughts is maximised: its value, whose gradient is the NLL term, and the score term's pay.

With y an outcome, that is all targets that a thought can change:

    M = log E_z p(y | x, z)        log-marginal: what perplexity measures
    J = E_z log p(y | x, z) <= M   expected log-probability
    P = E_z p(y | x, z)            expected success

J is a sum over targets, so any look-ahead will do. M and P are not: they are taken *jointly* over each unit's outcome
(types.Trace.unit_BN). A private thought is a unit, its outcome the whole look-ahead. Persistent thoughts change all
that follows in their document, so there the unit is the document from its first anchor on, all its thoughts together
are z, and look-ahead must be 0 (the rest of the document). What no thought comes before has a log-probability that
thoughts do not change; it is added as it is, under every bound. So M sums to the log-marginal of a row with persistent
thoughts; with private ones it does for a look-ahead of 1, longer ones count a target once for each thought that looks
at it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from thinking_lm.objectives.advantages import log_mean_exp


def J(trace):
  """1/G sum_g log p(y | x, z_g), summed over targets: unbiased for J. Nats."""
  total = jnp.sum(trace.logp_BGT.mean(axis=1) * trace.weights_BT)
  if trace.ahead_logp_BGNA is not None:
    total += jnp.sum(trace.ahead_logp_BGNA.mean(axis=1) * trace.ahead_weights_BNA)
  return total


def M(trace):
  """L_G = log 1/G sum_g p(y | x, z_g), summed over units; J <= E L_G <= M, rising with G (IWAE, 1509.00519). Nats.

  Its pathwise gradient is sum_g w_g grad log p(y | x, z_g) with w = softmax_g log p(y | x, z_g).
  """
  return _over_units(log_mean_exp, trace)


def P(trace):
  """1/G sum_g p(y | x, z_g), summed over units: unbiased for P. Its pathwise gradient weighs a sample by p / G."""
  return _over_units(lambda outcome_BGN: jnp.exp(outcome_BGN).mean(axis=1), trace)


def _over_units(of, trace):
  """`of` the outcome of every unit, and the log-probability of the targets that no thought changes."""
  N = trace.valid_BN.shape[1]
  unit_BN = trace.valid_BN & (trace.unit_BN == jnp.arange(N))
  return jnp.sum(trace.logp_BGT.mean(axis=1) * trace.free_BT) + jnp.sum(of(trace.outcome_BGN) * unit_BN)


def own(trace):
  """The trace as it is: each thought is paid by its own outcome."""
  return trace


def joint(trace):
  """The trace with each thought's outcome replaced by that of its unit: what a joint bound pays it by."""
  index_BGN = jnp.broadcast_to(trace.unit_BN[:, None], trace.outcome_BGN.shape)
  return trace.replace(outcome_BGN=jnp.take_along_axis(trace.outcome_BGN, index_BGN, axis=2))


class Bound(NamedTuple):
  """A member of the table.

  value: Trace -> what the NLL term maximises, summed. credit: Trace -> the trace by which thoughts are paid.
  rewards: those that make the score term the other half of the same gradient; None allows any (J with another reward
    maximises J by its NLL term and the expected reward by its score term).
  """

  value: Callable[..., jax.Array]
  credit: Callable
  rewards: tuple[str, ...] | None = None


BOUNDS = dict(
  J=Bound(J, own),
  M=Bound(M, joint, rewards=("log_prob", "info_gain")),
  P=Bound(P, joint, rewards=("prob",)),
)
