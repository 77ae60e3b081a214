"""WHEN a thought ends.

A thought ends at a think token that the policy drew as STOP, or at a state: a rule gives the probability that it ends
once it has j of its n think tokens, from the hidden state there. Shapes are static: what comes after the end is masked
in training (nothing later sees it, it is not scored, it costs no price), and decoding really stops there.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


def entropy(model, hidden_XD, j, config):
  """1 where the next real token's entropy is below config.stop_below nats: nothing is left to think about. Else 0.

  Asked before the first think token too, so that a thought may use none. Nothing is trained by it: any model that has
  thoughts can be run with it.
  """
  del j
  logp_XV = jax.nn.log_softmax(model.logits(hidden_XD))
  entropy_X = -jnp.sum(jnp.exp(logp_XV) * logp_XV, axis=-1)
  return (entropy_X < config.stop_below).astype(jnp.float32)


class Rule(NamedTuple):
  """A member of the table.

  chance: (model, hidden_XD, j, config) -> chance_X in [0, 1], that a thought of j think tokens ends there; None: it
    never does. draws: STOP is among the tokens that may be drawn, and closes a thought.
  """

  chance: Callable | None = None
  draws: bool = False


HALTING = dict(fixed=Rule(), stop=Rule(draws=True), entropy=Rule(entropy))
"""fixed: every thought uses all of its think tokens. stop: it ends where it draws the STOP row, which does not count as
a think token; STOP is one more token of the policy, and the policy gradient pays for stopping as for any other. A
thought that never draws it is closed after n tokens. entropy: see above."""


class Progress(NamedTuple):
  """Thoughts under way: which of them go on, the probability that none had ended yet, think tokens used so far."""

  going_X: jax.Array
  left_X: jax.Array
  used_X: jax.Array


def begin(model, config, hidden_XD) -> Progress:
  """At the anchors, whose hidden states these are."""
  shape = hidden_XD.shape[:-1]
  fresh = Progress(jnp.ones(shape, bool), jnp.ones(shape), jnp.zeros(shape, jnp.int32))
  return reached(model, config, fresh, hidden_XD, 0)


def drawn(model, config, progress: Progress, token_X) -> Progress:
  """After the next think token was made. It counts, unless it is a STOP that was drawn."""
  going_X = progress.going_X
  if HALTING[config.halting].draws:
    going_X &= token_X != model.stop
  return progress._replace(going_X=going_X, used_X=progress.used_X + going_X)


def reached(model, config, progress: Progress, hidden_XD, j) -> Progress:
  """After j think tokens, whose last hidden states these are: a thought ends once it is more likely over than not."""
  chance = HALTING[config.halting].chance
  if chance is None:
    return progress
  left_X = progress.left_X * (1 - chance(model, hidden_XD, j, config))
  return progress._replace(going_X=progress.going_X & (left_X > 0.5), left_X=left_X)


def used(config, tokens_Xn, stop: int):
  """used_X, int32: the think tokens of thoughts of which only the tokens are known: those before the first STOP."""
  n = tokens_Xn.shape[-1]
  ends_Xn = (tokens_Xn == stop) & HALTING[config.halting].draws
  return jnp.min(jnp.where(ends_Xn, jnp.arange(n), n), axis=-1, initial=n).astype(jnp.int32)
