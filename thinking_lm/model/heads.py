"""Heads: small named maps from hidden states to float32 numbers, beside the language-model head.

A head exists as parameters only in a model that was asked for it (`Model(..., heads=("value",))`); `rules.heads` alone
decides that from the config. Their parameters are `heads/NAME/...`, and a checkpoint with others still fits.
To add one, write a module of (width, rngs) and its line in the table.
"""

from collections.abc import Callable

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


HEADS: dict[str, Callable[[int, nnx.Rngs], nnx.Module]] = dict(value=Scalar)
"""name -> the module. value: the reward that is expected of a thought, read off its anchor's hidden state."""
