"""How far a policy may move: clipped importance ratios for thoughts that an older policy drew, and KL to a reference.

Everything here starts from log-probabilities of the same think tokens under two policies, and works on their
difference: a ratio of e^50 is an ordinary number there.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

LOG_RATIO_LIMIT = 20.0
"""Log-ratios of new to old policy beyond which the surrogate is constant: e^20 is finite, and far from any clip."""

KL_LIMIT = 10.0
"""Log-ratio of reference to policy beyond which k3 goes on as a straight line, so that e^50 does not end a run."""


def token(delta_BGNJ):
  """One ratio for each think token (PPO, Schulman et al. 2017, arXiv:1707.06347; GRPO, arXiv:2402.03300)."""
  return delta_BGNJ


def sequence(delta_BGNJ):
  """One ratio for each thought, the product of its tokens' (GSPO, arXiv:2507.18071, takes its 1/n-th power)."""
  return delta_BGNJ.sum(axis=-1, keepdims=True)


RATIOS = dict(token=token, sequence=sequence)


def bounded_exp(delta_X):
  """rho = exp(delta), with delta held within LOG_RATIO_LIMIT of 0."""
  return jnp.exp(jnp.clip(delta_X, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def surrogate(delta_X, advantage_X, low: float, high: float):
  """(min(rho A, clip(rho, 1 - low, 1 + high) A), whether the clip took the gradient away), rho = exp(delta).

  delta: log pi_new - log pi_old. That is rho A with rho held below 1 + high where A > 0, above 1 - low where A < 0
  (bounds of their own as in DAPO, arXiv:2503.14476), taken on the log-ratio. At delta = 0 the gradient is that of
  A log pi. No dual clip: where A < 0, a thought that became far more likely keeps its whole push back (up to
  LOG_RATIO_LIMIT).
  """
  top, bottom = jnp.log1p(high), jnp.log1p(-low)
  clipped_X = jnp.where(advantage_X > 0, jnp.minimum(delta_X, top), jnp.maximum(delta_X, bottom))
  value_X = bounded_exp(clipped_X) * advantage_X
  return value_X, jnp.where(advantage_X > 0, delta_X > top, delta_X < bottom) & (advantage_X != 0)


def k1(delta_X):
  """delta; its gradient is delta grad log pi, the score-function gradient (a plain one is 0 in expectation)."""
  return jax.lax.stop_gradient(delta_X) * (1 + delta_X - jax.lax.stop_gradient(delta_X))


def k2(delta_X):
  """delta^2 / 2: of the same gradient as k1, and never negative."""
  return 0.5 * jnp.square(delta_X)


def k3(delta_X):
  """exp(-delta) - 1 + delta: never negative. The penalty of GRPO (arXiv:2402.03300).

  Its gradient, (1 - pi_ref / pi) grad log pi, expects that of KL(pi_ref || pi), the other direction. Beyond
  -delta = KL_LIMIT the exponential goes on as its tangent: larger ratios pull with the force of e^KL_LIMIT.
  """
  near_X = jnp.minimum(-delta_X, KL_LIMIT)
  return jnp.exp(near_X) + jnp.exp(KL_LIMIT) * jnp.maximum(-delta_X - KL_LIMIT, 0) - 1 + delta_X


class Estimator(NamedTuple):
  """A member of the table, for tokens drawn from pi, delta = log pi - log pi_ref.

  of: delta -> estimate, whose gradient is that of a loss. unbiased: its expectation is KL(pi || pi_ref).
  gradient: which divergence has the gradient that is expected of it: `reverse` KL(pi || pi_ref), `forward` the other.
  Both are of a token given the tokens before it: that these lead to where the policies differ is not charged. What k3
  claims holds while no log-ratio of reference to policy is beyond KL_LIMIT.
  """

  of: Callable
  unbiased: bool
  gradient: str


ESTIMATORS = dict(
  k1=Estimator(k1, unbiased=True, gradient="reverse"),
  k2=Estimator(k2, unbiased=False, gradient="reverse"),
  k3=Estimator(k3, unbiased=True, gradient="forward"),
)
"""Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html); as losses, each with its gradient."""


def approximate_kl(delta_X):
  """KL(old || new) by tokens that the old policy drew, nats: rho - 1 - log rho, finite as `surrogate` is."""
  return bounded_exp(delta_X) - 1 - delta_X
