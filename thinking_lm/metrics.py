"""A metric is a sum and a count until it is printed, so that micro-batches, devices and hosts add up exactly."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Mean:
  """sum / count of something; both float32 scalars."""

  total: jax.Array
  count: jax.Array

  @classmethod
  def of(cls, values, weights) -> "Mean":
    """Weighted sum and weight of `values`, with `weights` broadcast to them."""
    weights = jnp.broadcast_to(weights, values.shape).astype(jnp.float32)
    values = jnp.where(weights > 0, values, 0.0).astype(jnp.float32)
    return cls(jnp.sum(values * weights), jnp.sum(weights))

  def __add__(self, other: "Mean") -> "Mean":
    return Mean(self.total + other.total, self.count + other.count)

  def __float__(self) -> float:
    return float(self.total) / max(float(self.count), 1e-30)


def add(left: Mapping[str, Mean], right: Mapping[str, Mean]) -> dict[str, Mean]:
  """Adds two sets of metrics name by name; both must have the same names."""
  if left.keys() != right.keys():
    raise ValueError(f"metrics differ: {sorted(left.keys() ^ right.keys())}")
  return {name: left[name] + right[name] for name in left}


def values(metrics: Mapping[str, Mean]) -> dict[str, float]:
  """What is printed: each mean as a float (0 for an empty one)."""
  return {name: float(mean) for name, mean in metrics.items()}
