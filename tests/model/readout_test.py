"""Reading logits: gradients that are written out, and those of a policy whose values are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import problem
from thinking_lm.model import readout
from thinking_lm.model.decoder import Model, ModelConfig
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.thoughts.tokens import categorical
from thinking_lm.types import Thoughts


def by_hand(logits_XV, token_X, temperature):
  logp_XV = jax.nn.log_softmax(logits_XV / temperature)
  chosen_X = jnp.take_along_axis(logp_XV, token_X[:, None], axis=-1)[:, 0]
  return chosen_X, -jnp.sum(jnp.exp(logp_XV) * logp_XV, axis=-1), logp_XV.max(axis=-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_written_gradients_are_those_of_automatic_differentiation(temperature):
  random = np.random.default_rng(0)
  with jax.enable_x64(True):
    logits, token = jnp.asarray(2 * random.normal(size=(6, 11))), jnp.asarray(random.integers(0, 11, 6))
    weights = random.normal(size=(2, 6))
    paid = lambda of: lambda logits: jnp.sum(weights * jnp.stack(of(logits, token, temperature)[:2]))
    curved = lambda of: jax.grad(lambda logits: (jax.grad(paid(of))(logits) ** 2).sum())
    for left, right in zip(categorical(logits, token, temperature), by_hand(logits, token, temperature), strict=True):
      np.testing.assert_allclose(left, right, rtol=1e-12)
    for order in (lambda of: jax.grad(paid(of)), curved):
      np.testing.assert_allclose(order(categorical)(logits), order(by_hand)(logits), rtol=1e-9, atol=1e-12)


def known(V, X, T):
  """(function, its arguments): gradient of what is paid for (log pi, entropy) of X thoughts of T tokens."""
  model = Model(ModelConfig(layers=1, width=8, heads=2), V)
  config = ThoughtConfig(kind="sampled", length=T, topology="private")
  random = np.random.default_rng(0)
  hidden = random.normal(size=(1, 1, X, T, 8)).astype(np.float32)
  tokens = random.integers(0, V, hidden.shape[:-1]).astype(np.int32)

  def gradient(params, hidden, pay, given):
    def total(params, hidden):
      decoder = model.bind(params)
      thoughts = Thoughts(decoder.embed(tokens), tokens)
      values = jax.lax.stop_gradient(readout.policy(decoder, config, hidden, thoughts)) if given else None
      logp, entropy = readout.policy(decoder, config, hidden, thoughts, values)
      return sum(weight * a.sum() for weight, a in ((pay[0], logp), (pay[1], entropy)) if weight)

    return jax.grad(total, (0, 1))(params, hidden)

  return jax.jit(gradient, static_argnums=(2, 3)), (model.init(jax.random.key(0)), hidden)


@pytest.mark.parametrize("pay", [(1.0, 0.0), (0.0, 1.0), (1.0, 0.3)])
def test_a_policy_that_is_known_has_the_gradient_of_one_that_is_not(pay, monkeypatch):
  gradient, arguments = known(V=7, X=3, T=2)
  for chunk in (readout.CHUNK, 20):
    monkeypatch.setattr(readout, "CHUNK", chunk)
    pairs = zip(*(jax.tree.leaves(gradient(*arguments, pay, given)) for given in (True, False)), strict=True)
    assert all(problem.relative(*pair) < 1e-6 for pair in pairs if np.any(pair[1]))
    jax.clear_caches()


def test_an_entropy_that_nothing_pays_for_is_not_differentiated():
  gradient, arguments = known(V=2_000, X=64, T=2)
  alone, both = (
    gradient.lower(*arguments, pay, True).compile().cost_analysis()["flops"] for pay in ((1.0, 0.0), (1.0, 0.3))
  )
  assert both - alone > 2 * 2_000 * 64 * 2  # two operations a logit, at least
