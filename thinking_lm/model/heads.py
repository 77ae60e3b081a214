"""Heads: small named maps from hidden states to float32 numbers, beside the language-model head.

A head exists as parameters only in a model that was asked for it (`Model(..., heads=("value",))`); `rules.heads` alone
decides that from the config. Their parameters are `heads/NAME/...`, and a checkpoint with others still fits.
To add one, write a module of (width, rngs) and its line in the table.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from thinking_lm.model.layers import parameter


class Scalar(nnx.Module):
  """hidden . weight + bias, one number for each hidden state [..., D] -> [...]; 0 for all at initialisation."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    self.weight = parameter(rngs, (width,), ("embed",), 0.0)
    self.bias = parameter(rngs, (1,), (None,), 0.0)

  def __call__(self, hidden_XD):
    return jnp.dot(hidden_XD.astype(jnp.float32), self.weight[...]) + self.bias[0]


class Pair(nnx.Module):
  """out . relu(first A + second B) + bias of two hidden states [..., D] -> [...]; 0 for all at initialisation."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    self.first, self.second = (parameter(rngs, (width, width), ("embed", None), (2 * width) ** -0.5) for _ in range(2))
    self.out = Scalar(width, rngs)

  def __call__(self, first_XD, second_XD):
    wide = (a.astype(jnp.float32) for a in (first_XD, second_XD))
    mixed = (jnp.dot(a, matrix[...]) for a, matrix in zip(wide, (self.first, self.second), strict=True))
    return self.out(jax.nn.relu(sum(mixed)))


HEADS: dict[str, Callable[[int, nnx.Rngs], nnx.Module]] = dict(
  value=Scalar, mix=Pair, halt=Scalar, router=Scalar, verdict=Scalar, surrogate=Pair
)
"""name -> the module.

value: the reward that is expected of a thought, read off its anchor's hidden state. mix: log-odds of trusting the
prediction after a thought, of the hidden states without it and with it. halt: log-odds that a thought ends at a state.
router: log-odds that there is a thought at all, of its anchor's hidden state. verdict: log-odds of the label 1 against
0; in a model with this head it predicts the targets, and not the language-model head. surrogate: RELAX's control
variate, of the state that a token is drawn from and the embedding of its relaxed copy.
"""
