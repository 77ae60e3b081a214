"""Mixtures against their formulas in float64."""

import jax
import numpy as np
import pytest

from thinking_lm.thoughts.mixing import MIXING

THINK, BASE = np.random.default_rng(0).normal(size=(2, 4, 5)) * 2
WEIGHT = np.array([0.01, 0.3, 0.5, 0.99])
softmax = lambda z: np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
EXPECTED = dict(
  probability=WEIGHT[:, None] * softmax(THINK) + (1 - WEIGHT[:, None]) * softmax(BASE),
  logit=softmax(WEIGHT[:, None] * THINK + (1 - WEIGHT[:, None]) * BASE),
)


@pytest.mark.parametrize("name", [name for name, mix in MIXING.items() if mix])
def test_by_its_formula(name):
  got = MIXING[name].of(*(np.float32(a) for a in (WEIGHT, THINK, BASE)))
  np.testing.assert_allclose(np.exp(got), EXPECTED[name], rtol=1e-4)


@pytest.mark.parametrize("name", [name for name, mix in MIXING.items() if mix])
def test_masked_rows_keep_finite_gradients(name):
  masked = np.where(np.arange(5) == 4, -1e30, BASE).astype(np.float32)
  found = jax.grad(lambda w, t: MIXING[name].of(w, t, masked)[:, 0].sum(), (0, 1))(
    np.float32(WEIGHT), np.where(np.arange(5) == 4, -1e30, THINK).astype(np.float32)
  )
  assert all(np.isfinite(leaf).all() for leaf in found)
