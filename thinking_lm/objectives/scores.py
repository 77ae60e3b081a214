"""Scoring rules: how good a reported distribution was, now that the token is known. Pure functions, higher is better.

A report names up to m tokens with a confidence each. `distribution` makes a distribution over the *whole* vocabulary of
whatever was said, by rules that leave nothing to gain from saying what is no distribution:

  * Of a token that is named twice, the last mention counts.
  * Confidences that sum past 1 are divided by their sum. A rule that took them as they are could be paid for certainty
    about everything: five times "1.0" would be worth log 1 = 0 whichever of the five comes.
  * What is left to 1 is *other*, spread evenly over all tokens that were not named. Were *other* scored as one outcome
    of its own, naming tokens that never come, at confidence 0, would be a perfect forecast of "other": the reporter
    chooses the partition, so that a partition must not be cheap. Spread out, a vague report is what it says, nearly
    uniform, and naming a token of probability p is worth having.
    (Where nothing is left to name, the named ones are divided by their sum, all 0 meaning all equal.)

So a report is a point of the simplex over the vocabulary, one that is constant on *other*. For a rule that is strictly
proper there, the best report for given names is the true probability of each name and of *other*: the expected score of
a quadratic or spherical rule only sees the true distribution's mean over *other*, and that of a logarithmic one differs
from the partition's by a constant. The best names are the most likely tokens. The rules are those of Gneiting & Raftery
(2007, doi:10.1198/016214506000001437).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

CLIP = 0.01
"""The least probability that `clipped_log` tells apart from 0."""


class Spoken(NamedTuple):
  """A distribution over Z = I + 1 classes of tokens: the I named ones, then *other*.

  mass_XZ: probability of each class, they sum to 1. size_XZ: how many tokens it has, over which its mass is spread
  evenly; 0 where a later mention took its place, and for *other* when every token is named.
  """

  mass_XZ: jnp.ndarray
  size_XZ: jnp.ndarray

  @property
  def density_XZ(self):
    """Probability of one token of each class."""
    return self.mass_XZ / jnp.maximum(self.size_XZ, 1)


def last_mention(candidates_XI):
  """bool_XI: no later pair names the same token."""
  same_XII = candidates_XI[..., :, None] == candidates_XI[..., None, :]
  return ~jnp.any(jnp.triu(same_XII, 1), axis=-1)


def distribution(candidates_XI, confidences_XI, vocabulary: int) -> Spoken:
  """The distribution that pairs of a token and a confidence in [0, 1] stand for; see above."""
  counts_XI = last_mention(candidates_XI)
  said_XI = confidences_XI * counts_XI
  sum_X1 = said_XI.sum(axis=-1, keepdims=True)
  names_X1 = counts_XI.sum(axis=-1, keepdims=True)
  all_named_X1 = names_X1 == vocabulary
  total_X1 = jnp.where(all_named_X1, sum_X1, jnp.maximum(sum_X1, 1.0))
  mass_XI = jnp.where(total_X1 > 0, said_XI / jnp.where(total_X1 > 0, total_X1, 1.0), counts_XI / names_X1)
  other_X1 = jnp.where(all_named_X1, 0.0, jnp.maximum(1.0 - mass_XI.sum(axis=-1, keepdims=True), 0.0))
  sizes = (counts_XI, vocabulary - names_X1)
  return Spoken(jnp.concatenate([mass_XI, other_X1], -1), jnp.concatenate(sizes, -1).astype(mass_XI.dtype))


def happened(candidates_XI, target_X):
  """bool_XZ, one-hot: the class that the target is of."""
  named_XI = last_mention(candidates_XI) & (candidates_XI == target_X[..., None])
  return jnp.concatenate([named_XI, ~named_XI.any(axis=-1, keepdims=True)], axis=-1)


def _of_target(values_XZ, hit_XZ):
  return jnp.sum(jnp.where(hit_XZ, values_XZ, 0.0), axis=-1)


def brier(spoken: Spoken, hit_XZ):
  """-sum_v (q_v - [v = y])^2 over the vocabulary, in [-2, 0] (Brier 1950). Strictly proper."""
  square_X = jnp.sum(spoken.mass_XZ * spoken.density_XZ, axis=-1)
  return 2 * _of_target(spoken.density_XZ, hit_XZ) - square_X - 1


def spherical(spoken: Spoken, hit_XZ):
  """q_y / sqrt(sum_v q_v^2) over the vocabulary, in [0, 1]. Strictly proper."""
  square_X = jnp.sum(spoken.mass_XZ * spoken.density_XZ, axis=-1)
  return _of_target(spoken.density_XZ, hit_XZ) / jnp.sqrt(square_X)


def clipped_log(spoken: Spoken, hit_XZ):
  """log q_y with every class's probability raised to CLIP at least and all divided by their sum; nats, finite.

  Strictly proper if every class truly has probability CLIP or more: the clipped report is a distribution still, and
  equal to the true one only if the report is. A rarer class is best reported as anything up to about CLIP.
  """
  there_XZ = spoken.size_XZ > 0
  mass_XZ = jnp.where(there_XZ, jnp.maximum(spoken.mass_XZ, CLIP), 0.0)
  mass_XZ = mass_XZ / mass_XZ.sum(axis=-1, keepdims=True)
  return jnp.log(_of_target(Spoken(mass_XZ, spoken.size_XZ).density_XZ, hit_XZ))


def zero_one(spoken: Spoken, hit_XZ):
  """1 if the named token of the largest probability (the first of equal ones) is the target, else 0.

  What an accuracy pays. Not proper: it says nothing about how sure to be, which is why it is here, as a control.
  """
  best_X1 = jnp.argmax(spoken.mass_XZ[..., :-1], axis=-1, keepdims=True)
  return jnp.take_along_axis(hit_XZ, best_X1, axis=-1)[..., 0].astype(spoken.mass_XZ.dtype)


class Rule(NamedTuple):
  """A member of the table and its claim.

  of: (Spoken, happened_XZ) -> score_X. floor: it is strictly proper where every class's true probability is at least
  so much; None: it is not proper.
  """

  of: Callable
  floor: float | None


SCORES = dict(
  brier=Rule(brier, floor=0.0),
  spherical=Rule(spherical, floor=0.0),
  clipped_log=Rule(clipped_log, floor=CLIP),
  zero_one=Rule(zero_one, floor=None),
)


def score(name: str, report):
  """score_BGN of the reports of a trace (types.Report) by the rule `name`."""
  spoken = distribution(report.candidates_BGNI, report.confidences_BGNI, report.vocabulary)
  target_BGN = jnp.broadcast_to(report.target_BN[:, None], report.candidates_BGNI.shape[:-1])
  return SCORES[name].of(spoken, happened(report.candidates_BGNI, target_BGN))
