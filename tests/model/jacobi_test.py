"""Parallel iterations against the serial stream that they approximate."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.model import problem
from tests.model.problem import ANCHORS, BATCH, TIED, UNTIED, relative
from tests.slow import leaving
from thinking_lm.thoughts.spec import ThoughtConfig

Thought = functools.partial(ThoughtConfig, kind="latent", length=2)
ENOUGH = max(map(len, ANCHORS)) * 2 + 1
VALID_BGN = problem.layout().anchors_BN[:, None] < problem.T
CASES = dict(
  latent=(dataclasses.replace(UNTIED, layers=1), Thought(rotary="advance")),
  soft=(TIED, Thought(kind="soft", delimiters=True, top_k=3)),
)


def run(config, thought):
  assert not thought.faults()
  arguments = problem.params(config), BATCH, problem.layout(), problem.cotangents(thought)
  return jax.device_get(problem.compiled(config, thought)(*arguments))


@pytest.mark.parametrize("name", leaving(CASES, ["soft"]))
def test_a_pass_for_every_think_token_and_one_more_are_the_serial_stream(name):
  config, thought = CASES[name]
  (number, trace), gradient = run(config, dataclasses.replace(thought, iterations=ENOUGH))
  (same, expected), wanted = run(config, thought)
  np.testing.assert_allclose(number, same, rtol=1e-4)
  real_BT = BATCH.segments_BT > 0
  np.testing.assert_allclose(trace.logp_BGT[:, 0][real_BT], expected.logp_BGT[:, 0][real_BT], rtol=1e-3, atol=1e-4)
  there = VALID_BGN[..., None, None] * np.ones(trace.thoughts.inputs_BGNJD.shape)
  assert relative(trace.thoughts.inputs_BGNJD * there, expected.thoughts.inputs_BGNJD * there) < 1e-4
  assert relative(gradient, wanted) < 1e-3
  assert trace.residual_BGN[VALID_BGN].max() < 1e-4 and expected.residual_BGN is None


def test_fewer_passes_are_an_approximation_and_say_so():
  config, thought = CASES["latent"]
  (number, trace), gradient = run(config, dataclasses.replace(thought, iterations=3))
  (same, last), partial = run(config, dataclasses.replace(thought, iterations=3, through=1))
  _, wanted = run(config, thought)
  first_BG = np.arange(VALID_BGN.shape[2]) == 0
  np.testing.assert_array_less(trace.residual_BGN[VALID_BGN & first_BG], 1e-4)  # its n + 1 passes are done
  assert trace.residual_BGN[VALID_BGN].max() > 1e-2 and relative(gradient, wanted) > 1e-2
  np.testing.assert_allclose(same, number, rtol=1e-5)
  np.testing.assert_allclose(last.residual_BGN, trace.residual_BGN, rtol=1e-3, atol=1e-5)
  assert relative(partial, gradient) > 1e-2


def test_iterations_that_mean_nothing_are_refused():
  reasons = {
    "kind 'latent' or 'soft'": Thought(kind="sampled", iterations=2),
    "side by side anyway": Thought(topology="private", iterations=2),
    "halting 'fixed'": Thought(kind="latent", halting="entropy", iterations=2),
    "not so many passes": Thought(iterations=2, through=3),
  }
  for words, thought in reasons.items():
    assert any(words in fault for fault in thought.faults()), words
