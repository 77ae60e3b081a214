"""Several draws of the thoughts: what a thinker that averages over its thoughts predicts."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from thinking_lm.sharding import fetch
from thinking_lm.types import Batch, Params

AT_ONCE = 8
"""Draws of a thought in one call, whose log-probabilities are in memory at once, however many are asked for."""


class Draws(NamedTuple):
  """K draws of the thoughts, float64 nats of each row: `marginal` -log-mean-exp, `expected` the mean (`Mixer`)."""

  marginal_R: np.ndarray
  expected_R: np.ndarray


class Mixer:
  """log-mean-exp over the first K of a sequence of draws, for several K at once, in memory that no K adds to.

  Draw k uses fold_in(key, k), the row's id and the anchor: K = 8 is the first 8 of K = 32, and the same however many
  are computed at once. With weights w_t of the targets,

      private:     nats(row) = -sum_t w_t log 1/K sum_k p(y_t | x_<=t, z_k)      each thought serves its anchor's target
      persistent:  nats(row) = -log 1/K sum_k exp(sum_t w_t log p(y_t | x_<=t, z_k<=t))   a row's thoughts go together:
                   the pasts of two draws differ, so that their targets cannot be mixed one by one

  Both are, in expectation, upper bounds on the nats of the marginal that fall with K. The second one is weaker: its
  unit is the row and not the token.

  Args:
    draw: (parameters, batch, keys_K) -> logp_KBT. private: the first case.
  """

  def __init__(self, draw: Callable, private: bool, samples: Sequence[int]):
    self._draw, self._private, self.samples = draw, private, tuple(sorted(set(samples)))
    self._most = max(self.samples, default=0)
    self._size = min(AT_ONCE, self._most)

  def __call__(self, params: Params, batch: Batch, key, weights_BT: np.ndarray) -> dict[int, Draws]:
    """K -> Draws of the rows of a batch."""
    found: dict[int, Draws] = {}
    mixed, total_B = np.array(-np.inf), np.zeros(len(weights_BT))
    for first in range(0, self._most, self._size):
      keys_K = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(first, first + self._size))
      logp_KBT = np.asarray(fetch(self._draw(params, batch, keys_K)), np.float64)
      for k in range(first, min(first + self._size, self._most)):
        weighed_BT = np.where(weights_BT > 0, logp_KBT[k - first], 0.0) * weights_BT
        total_B = total_B + weighed_BT.sum(axis=1)
        mixed = np.logaddexp(mixed, logp_KBT[k - first] if self._private else weighed_BT.sum(axis=1))
        if k + 1 in self.samples:
          mean = mixed - np.log(k + 1)
          if self._private:
            mean = np.sum(np.where(weights_BT > 0, mean, 0.0) * weights_BT, axis=1)
          found[k + 1] = Draws(-mean, -total_B / (k + 1))
    return found
