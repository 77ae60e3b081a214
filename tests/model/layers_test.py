"""Products: what is multiplied in which type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import traced
from thinking_lm.model.layers import matmul, product

EQUATIONS = {
  "ni,io->no": ((6, 5), (5, 4), "no,io->ni", "ni,no->io"),
  "...mx,...sx->...ms": ((2, 3, 4), (2, 5, 4), "...ms,...sx->...mx", "...mx,...ms->...sx"),
}
"""Shapes of both factors, and how the cotangent is multiplied with the right one, and the left one with it."""


def given(equation, dtype):
  """Factors of this type, and a cotangent that it has not rounded."""
  keys = jax.random.split(jax.random.key(0), 3)
  left, right = (jax.random.normal(key, shape) for key, shape in zip(keys[:2], EQUATIONS[equation][:2], strict=True))
  dy = jax.random.normal(keys[2], jnp.einsum(equation, left, right).shape)
  return left.astype(dtype), right.astype(dtype), dy


def pulled(equation, left, right, dy):
  """(y, gradient of the left factor, of the right one)."""
  y, pull = jax.vjp(lambda left, right: product(equation, left, right), left, right)
  return y, *pull(dy)


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_all_three_products_are_of_the_type_of_the_factors(equation, dtype):
  """Of two types none of them reaches a processor's bfloat16 units."""
  asked = jax.make_jaxpr(lambda *arrays: pulled(equation, *arrays))(*given(equation, dtype))
  dots = [e for e in traced.equations(asked.jaxpr) if e.primitive.name == "dot_general"]
  assert len(dots) == 3
  for dot in dots:
    assert [v.aval.dtype for v in dot.invars] == [dtype, dtype]
    assert [v.aval.dtype for v in dot.outvars] == [jnp.float32]


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("dtype, tolerance", ((jnp.float32, 1e-6), (jnp.bfloat16, 2**-7)))
def test_values_and_gradients_against_float64(equation, dtype, tolerance):
  left, right, dy = given(equation, dtype)
  a, b, c = (np.asarray(each, np.float64) for each in (left, right, dy.astype(dtype)))
  _, _, to_left, to_right = EQUATIONS[equation]
  expected = np.einsum(equation, a, b), np.einsum(to_left, c, b), np.einsum(to_right, a, c)
  for got, wanted in zip(pulled(equation, left, right, dy), expected, strict=True):
    assert np.linalg.norm(np.asarray(got, np.float64) - wanted) <= tolerance * np.linalg.norm(wanted)


def test_leading_axes_are_kept():
  x_NI, w_IO, _ = given("ni,io->no", jnp.bfloat16)
  y = matmul(x_NI.reshape(2, 3, -1), w_IO.astype(jnp.float32))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y.reshape(6, 4), product("ni,io->no", x_NI, w_IO).astype(jnp.bfloat16))
