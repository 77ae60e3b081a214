"""WHEN a thought ends.

A thought ends at a think token that the policy drew as STOP, or at a state: a rule gives the log-odds that it ends once
it has j of its n think tokens, from the hidden state there. Shapes are static: what comes after the end is masked
in training (nothing later sees it, it is not scored, it costs no price), and decoding really stops there.

Rules with a head are learned by the expectation over all ends, which are then all scored (types.Trace.exit_logp_BGNK).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from thinking_lm.thoughts import report
from thinking_lm.thoughts.tokens import entropy_of, fold


def entropy(model, hidden_XD, j, config):
  """Certain where the next real token's entropy is below config.stop_below nats: nothing is left to think about.

  Asked before the first think token too, so that a thought may use none. Nothing is trained by it: any model that has
  thoughts can be run with it.
  """
  del j
  return jnp.where(entropy_of(model.logits(hidden_XD)) < config.stop_below, jnp.inf, -jnp.inf)


def ponder(model, hidden_XD, j, config):
  """Of a head's lambda_j, at every state before the n-th token (PonderNet, arXiv:2107.05407; there a step comes first).

  Ends after j tokens with probability p_j = lambda_j prod_{i < j} (1 - lambda_i); p_n is what is left.
  """
  del j, config
  return model.heads["halt"](hidden_XD)


def router(model, hidden_XD, j, config):
  """Ends at once but for sigma(w h) of the anchor's state: all n tokens or none, a learned placement among anchors."""
  del config
  return jnp.where(j == 0, -model.heads["router"](hidden_XD), -jnp.inf)


class Rule(NamedTuple):
  """A member of the table.

  odds: (model, hidden_XD, j, config) -> log-odds_X that a thought of j think tokens ends there; None: it never does.
  draws: STOP is among the tokens that may be drawn, and closes a thought. head: of model.heads, which the odds are
  learned by. once: it ends at the anchor or uses all n tokens.
  """

  odds: Callable | None = None
  draws: bool = False
  head: str | None = None
  once: bool = False


HALTING = dict(
  fixed=Rule(),
  stop=Rule(draws=True),
  entropy=Rule(entropy),
  ponder=Rule(ponder, head="halt"),
  router=Rule(router, head="router", once=True),
)
"""fixed: every thought uses all of its think tokens. stop: it ends where it draws the STOP row, which does not count as
a think token; STOP is one more token of the policy, and the policy gradient pays for stopping as for any other. A
thought that never draws it is closed after n tokens. The others: see above."""


def exits(config) -> tuple[int, ...]:
  """The K lengths at which a thought of a learned rule can end, ascending; the last is n."""
  return (0, config.length) if HALTING[config.halting].once else tuple(range(config.length + 1))


def exit_logp(model, config, states_XKD):
  """log-probability of each of the exits, float32 [..., K], of the states there (the last state decides nothing)."""
  odds_XK = HALTING[config.halting].odds(model, states_XKD[..., :-1, :], jnp.asarray(exits(config)[:-1]), config)
  left_XK = jnp.cumsum(jax.nn.log_sigmoid(-odds_XK), axis=-1)
  pad = lambda a_XK, before, after: jnp.pad(a_XK, [(0, 0)] * (a_XK.ndim - 1) + [(before, after)])
  return pad(left_XK, 1, 0) + pad(jax.nn.log_sigmoid(odds_XK), 0, 1)


class Progress(NamedTuple):
  """Thoughts under way.

  going_X: which go on. left_X: probability that one has not ended yet; it ends where that is not above level_X. used_X:
  think tokens so far. first_X: the token that its report begins at, as far as is known; None where none reports.
  """

  going_X: jax.Array
  left_X: jax.Array
  level_X: jax.Array
  used_X: jax.Array
  first_X: jax.Array | None = None


def fresh(config, shape, keys_X) -> Progress:
  """Before the first think token, of thoughts of any shape. keys_X: their random keys; None where no end is drawn.

  A level drawn uniformly ends a thought after j tokens with probability p_j; a constant one makes no draw.
  """
  level_X = jnp.full(shape, 1 - (config.stop_at or 0.5))
  if config.draws_end and keys_X is not None:
    level_X = jax.vmap(jax.random.uniform)(fold(keys_X, config.length).reshape(-1)).reshape(shape)
  first_X = jnp.full(shape, config.free) if config.report else None
  return Progress(jnp.ones(shape, bool), jnp.ones(shape), level_X, jnp.zeros(shape, jnp.int32), first_X)


def begin(model, config, hidden_XD, keys_X) -> Progress:
  """At the anchors, whose hidden states these are."""
  return reached(model, config, fresh(config, hidden_XD.shape[:-1], keys_X), hidden_XD, 0)


def drawn(model, config, progress: Progress, token_X, i) -> Progress:
  """After think token i was made. It counts, unless it is a STOP that was drawn."""
  if config.report:
    return report.drawn(model, config, progress, token_X, i)
  going_X = progress.going_X
  if HALTING[config.halting].draws:
    going_X &= token_X != model.stop
  return progress._replace(going_X=going_X, used_X=progress.used_X + going_X)


def reached(model, config, progress: Progress, hidden_XD, j) -> Progress:
  """After j think tokens, whose last hidden states these are."""
  odds = HALTING[config.halting].odds
  if odds is None:
    return progress
  left_X = progress.left_X * jax.nn.sigmoid(-odds(model, hidden_XD, j, config))
  return progress._replace(going_X=progress.going_X & (left_X > progress.level_X), left_X=left_X)


def used(config, tokens_Xn, stop: int):
  """used_X, int32: the think tokens of thoughts of which only the tokens are known: those before the first STOP."""
  n = tokens_Xn.shape[-1]
  ends_Xn = (tokens_Xn == stop) & HALTING[config.halting].draws
  used_X = jnp.min(jnp.where(ends_Xn, jnp.arange(n), n), axis=-1, initial=n).astype(jnp.int32)
  return report.used(used_X, config) if config.report else used_X
