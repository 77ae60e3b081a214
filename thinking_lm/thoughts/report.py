"""Thoughts that say their own prediction aloud: m pairs (candidate, confidence), drawn like any other think token.

The last 2m of a thought's n tokens are its report: a real token, then one of K confidence rows that stand for
0, 1 / (K - 1) ... 1, and so on. Where a thought may draw STOP, the report begins right after it, so that what is behind
its end is again a tail: with f = n - 2m free tokens,

    no STOP:          z_0 ... z_{f-1}  c_0 b_0 ... c_{m-1} b_{m-1}
    STOP at u < f:    z_0 ... z_{u-1}  STOP  c_0 b_0 ... c_{m-1} b_{m-1}  (n - u - 1 - 2m tokens that do not exist)

The next real token is predicted from the last slot, so that the prediction can read the report.
"""

import jax.numpy as jnp

from thinking_lm.thoughts.tokens import draw, log_policy

THINK, CANDIDATE, CONFIDENCE = range(3)
"""What a token of a thought is for."""

HALTING = ("fixed", "stop")
"""The rules that leave a place for a report."""


def used(rule_X, config):
  """used_X, think tokens with the report: `rule_X` is what the halting rule says, the tokens before a STOP or n."""
  return jnp.where(rule_X < config.free, rule_X + 2 * config.report, config.length)


def first(tokens_Xn, config, stop: int):
  """first_X, the index of the token that a thought's report begins at."""
  n, index_n = config.length, jnp.arange(config.length)
  at_X = jnp.min(jnp.where(tokens_Xn == stop, index_n, n), axis=-1, initial=n)
  return jnp.where(at_X < config.free, at_X + 1, config.free)


def role(index, first_X, config):
  """What token `index` is for where the report begins at `first_X`; THINK behind the end too."""
  place = index - first_X
  return jnp.where((place < 0) | (place >= 2 * config.report), THINK, CANDIDATE + place % 2)


def roles(tokens_Xn, config, stop: int):
  """role_Xn of every token of drawn thoughts."""
  return role(jnp.arange(config.length), first(tokens_Xn, config, stop)[..., None], config)


def allowed(role_X, config):
  """Which rows a token may be drawn from, as `Decoder.logits` takes it."""
  return dict(stop=(role_X == THINK) & config.may_stop, confidence=role_X == CONFIDENCE)


def say(model, hidden_XD, keys_X, config, index, first_X):
  """(input_XD, token_X): draws token `index` among the rows of its role."""
  role_X = role(index, first_X, config)
  token_X = draw(model.logits(hidden_XD, **allowed(role_X, config)), keys_X, config.temperature)
  return model.embed(token_X), token_X


def drawn(model, config, progress, token_X, index):
  """The halting.Progress after token `index`: a STOP makes the report begin, and with it the thought ends."""
  stopped_X = (token_X == model.stop) & (index < progress.first_X)
  first_X = jnp.where(stopped_X, index + 1, progress.first_X)
  return progress._replace(
    going_X=progress.going_X & (index + 1 < first_X + 2 * config.report),
    used_X=progress.used_X + (progress.going_X & ~stopped_X),
    first_X=first_X,
  )


def policy(model, hidden_XD, token_X, role_X, config):
  """(log pi(token), entropy) of the distribution that `say` draws from, nats."""
  return log_policy(model.logits(hidden_XD, **allowed(role_X, config)), token_X, config.temperature)


def pairs(tokens_Xn, config, stop: int, lowest: int):
  """(candidates_XI, confidences_XI in [0, 1]) as they were said; `lowest` is the row of confidence 0."""
  index_XI = first(tokens_Xn, config, stop)[..., None] + 2 * jnp.arange(config.report)
  at = lambda index: jnp.take_along_axis(tokens_Xn, index, axis=-1)
  return at(index_XI), jnp.clip((at(index_XI + 1) - lowest) / (config.bins - 1), 0.0, 1.0)
