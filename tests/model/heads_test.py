"""Heads exist only when asked for, change nothing else, and are float32 numbers of the hidden state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import problem
from tests.slow import leaving
from thinking_lm.errors import ConfigError
from thinking_lm.model.decoder import Model
from thinking_lm.model.heads import HEADS
from thinking_lm.training.state import named_leaves

D = problem.UNTIED.width


def test_without_heads_there_is_no_trace_of_them():
  assert not any("heads" in name for name in named_leaves(Model(problem.UNTIED, problem.V).shapes))


@pytest.mark.parametrize("name", leaving(HEADS, list(HEADS)[2:]))
def test_a_head_is_added_and_nothing_else_is_drawn_differently(name):
  plain, model = Model(problem.UNTIED, problem.V), Model(problem.UNTIED, problem.V, heads=(name,))
  before, after = (named_leaves(jax.jit(m.init)(jax.random.key(3))) for m in (plain, model))
  assert {leaf for leaf in after if leaf not in before} == {f for f in after if f.startswith(f"heads/{name}/")} != set()
  for leaf, value in before.items():
    np.testing.assert_array_equal(after[leaf], value)
  for leaf, axes in named_axes(model.axes).items():
    assert len(axes) == after[leaf].ndim and after[leaf].dtype == jnp.float32


def named_axes(axes):
  leaves = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda node: isinstance(node, tuple))
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_value_is_linear_float32_and_0_at_first():
  model = Model(problem.TIED, problem.V, heads=("value",))
  params = model.init(jax.random.key(0))
  hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, D)), jnp.bfloat16)
  value = model.bind(params).heads["value"](hidden)
  assert value.shape == (2, 3) and value.dtype == jnp.float32 and not value.any()
  params["heads"]["value"] = dict(weight=jnp.arange(D, dtype=jnp.float32), bias=jnp.array([0.5]))
  expected = np.asarray(hidden, np.float64) @ np.arange(D) + 0.5
  np.testing.assert_allclose(model.bind(params).heads["value"](hidden), expected, rtol=1e-5)


def test_an_unknown_head_lists_the_known_ones():
  with pytest.raises(ConfigError, match=r"unknown head 'valeu'; known: .*value"):
    Model(problem.TIED, problem.V, heads=("valeu",))
