"""Control variates of the score term: taken off a thought's reward, and put back by reparametrisation.

    grad E f = E[ (f(token) - c(z')) grad log pi(token)  +  grad c(z) - grad c(z') ]      (thoughts/relaxed.py)

Each member is a pure function (config, trace) -> c_BGN, in the reward's unit, whose gradient is that of c(z) - c(z')
with respect to the policy. With any c at all the expectation stays what it was.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from thinking_lm.objectives.bounds import BOUNDS
from thinking_lm.objectives.rewards import REWARDS
from thinking_lm.types import Surrogate


def rebar(config, trace):
  """The reward of the relaxed thought (REBAR, Tucker et al. 2017, arXiv:1703.07370)."""
  copies = BOUNDS[config.bound].credit(trace.replace(outcome_BGN=trace.relaxed_BGN))
  return REWARDS[config.reward].of(copies)


def relax(config, trace):
  """What a head says of the relaxed thought, taught by `variance` (RELAX, Grathwohl et al. 2018, arXiv:1711.00123).

  As there for rewards that cannot be differentiated; their sum with REBAR's c, and a learned temperature, are left out.
  """
  del config
  return trace.surrogate.value_BGN


def variance(advantage_BGN, weight: float, surrogate: Surrogate):
  """|1/G sum_g (A_g grad log pi(z_g) + weight grad c(z_g))|^2 of each group [B, N], gradients at the policy's logits.

  Its expectation is, but for a constant, the variance of the score term's estimate, since no c changes the mean: what
  c is to make small. In the paper the gradient is that with respect to the policy's parameters, which here would be
  all of the model's; at the logits they receive is where c can be told from one example. Differentiable in the head,
  through c in A and its slope.
  """
  each_BGNV = advantage_BGN[..., None] * surrogate.score_BGNV + weight * surrogate.slope_BGNV
  return jnp.sum(jnp.square(each_BGNV.mean(axis=1)), axis=-1)


class Variate(NamedTuple):
  """A member of the table and its claim.

  of: (config, trace) -> c_BGN. unbiased: the expected gradient is that of the score term without it. head: of
  model.heads, which learns it. smooth: the reward must be a differentiable function of the outcome.
  """

  of: Callable[..., jax.Array]
  unbiased: bool
  head: str | None = None
  smooth: bool = False


VARIATES = dict(
  rebar=Variate(rebar, unbiased=True, smooth=True),
  relax=Variate(relax, unbiased=True, head="surrogate"),
)
