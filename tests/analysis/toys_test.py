"""The toys: that their numbers are those of this project's objectives, at sizes that run at once."""

import jax
import numpy as np
import pytest

from thinking_lm.analysis import toys


@pytest.fixture(scope="module")
def params():
  return toys._tables(0)


def relative(got, wanted):
  return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def test_the_groups_are_all_groups(params):
  index_XG, probability_X = toys._groups(params, 2)
  assert len(index_XG) == 36 * 37 // 2 and probability_X.sum() == pytest.approx(1, rel=1e-6)
  single = np.exp(np.asarray(toys._logs(params)[0], np.float64))
  found_Z = sum(np.bincount(index_XG[:, g], weights=probability_X, minlength=36) for g in range(2)) / 2
  np.testing.assert_allclose(found_Z, single, rtol=1e-5)


def test_biases_of_pairs_of_thoughts(params, monkeypatch):
  monkeypatch.setattr(toys, "spread", lambda trees: (None, 1.0))  # the noise is not looked at here
  monkeypatch.setattr(toys, "_each", lambda *arguments: None)
  wanted = toys.flat(jax.grad(toys._exact)(params, "J"))
  found = {name: relative(toys.bias_of(name, params, 2)[0], wanted) for name in ("hybrid", "grpo", "nll_only", "rlp")}
  assert found["hybrid"] < 1e-4 < 0.1 < min(found["grpo"], found["nll_only"], found["rlp"])


def test_exact_values_by_hand(params):
  logs = [np.asarray(a, np.float64) for a in toys._logs(params)]
  expected = dict(J=(np.exp(logs[0]) * logs[1]).sum(), M=np.log(np.exp(logs[0] + logs[1]).sum()))
  for bound, value in expected.items():
    assert float(toys._exact(params, bound)) == pytest.approx(value, rel=1e-5)


def test_a_bottleneck_that_is_learned_and_one_that_is_not():
  learned, not_learned = (toys.train(name, seeds=1, steps=400)[0] for name in ("exact_J", "nll_only"))
  assert learned > 0.4 > 0.15 > not_learned


@pytest.mark.parametrize("name", ["rebar", "vimco"])
def test_sampled_thoughts_are_learned_too(name):
  assert toys.train(name, seeds=1, steps=400)[0] > 0.3
