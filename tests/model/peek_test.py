"""Reward leaks: a token to come changes no thought, no pay and no prediction before it, and a leak would be seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import problem
from thinking_lm.model.decoder import Model
from thinking_lm.model.rollout import rollout
from thinking_lm.thoughts import topology
from thinking_lm.thoughts.spec import ThoughtConfig

T = 6
ROW = problem.pack([[0, 1, 2, 1, 3, 4]], [(T,)])
ANCHORS = (1, 3)
MODEL = Model(problem.TIED, problem.V, heads=("halt", "mix"), confidences=3)
PARAMS = problem.moved(MODEL, 0.05)
CASES = dict(
  persistent=dict(kind="sampled", length=2, samples=2, lookahead=1),
  iterated=dict(kind="latent", length=1, iterations=2),
  private=dict(kind="sampled", topology="private", length=2, samples=2, lookahead=2),
  answer=dict(kind="sampled", topology="private", length=1, samples=2, answer=2),
  ponder=dict(kind="latent", topology="private", length=2, halting="ponder", lookahead=1),
  mixed=dict(kind="gumbel", topology="private", length=2, samples=2, mixing="probability", lookahead=1),
  soft=dict(kind="soft", length=2, lookahead=1),
  report=dict(kind="sampled", topology="private", length=2, samples=2, report=1, bins=3, lookahead=1),
)


def peeks(thought: ThoughtConfig) -> bool:
  """Whether any other token right after an anchor changes what is thought there, its log-probability, or a prediction
  up to there. All variants are rows of one batch, drawn with the same keys.
  """
  variants = [np.array(ROW.tokens_BT[0])]
  for anchor in ANCHORS:
    for token in range(problem.V):
      variants.append(variants[0].copy())
      variants[-1][anchor + 1] = token
  batch = jax.tree.map(lambda a: np.repeat(a, len(variants), axis=0), ROW).replace(tokens_BT=np.stack(variants))
  layout = problem.layout([list(ANCHORS)] * len(variants), block=2, T=T)
  run = lambda params: rollout(MODEL, thought, params, batch, layout, jax.random.key(3))
  trace = jax.device_get(jax.jit(run)(PARAMS))
  for n, anchor in enumerate(ANCHORS):
    rows = [0, *range(1 + n * problem.V, 1 + (n + 1) * problem.V)]
    told = [trace.logp_BGT[rows, :, : anchor + 1], trace.thoughts.tokens_BGNJ[rows, :, n]]
    told += [a[rows, :, n] for a in (trace.token_logp_BGNJ, trace.thoughts.answer_BGNA) if a is not None]
    if not thought.kind_of.discrete:
      told.append(trace.thoughts.inputs_BGNJD[rows, :, n])
    assert all(len(a) > 2 for a in told)
    if trace.exit_logp_BGNK is not None:
      told += [trace.exit_logp_BGNK[rows, :, n]]
    if not all(np.array_equal(a, np.broadcast_to(a[:1], a.shape)) for a in told):
      return True
  return False


@pytest.mark.parametrize("name", CASES)
def test_a_thought_that_sees_the_next_token_is_noticed(name, monkeypatch):
  thought = ThoughtConfig(**CASES[name])
  assert not thought.faults() and not peeks(thought)
  private, sees = topology.private, topology.sees

  def leaky(batch, layout, *rest):
    prefix_BNT = jnp.arange(T) <= layout.anchors_BN[..., None] + 1
    return private(batch, layout, *rest)._replace(prefix_BNT=prefix_BNT)

  if thought.topology == "private":
    monkeypatch.setattr(topology, "private", leaky)
  else:  # the slots of a thought, and the real one behind them
    ahead = thought.slots + 1
    monkeypatch.setattr(topology, "sees", lambda own, all_, slot_Q, slot_S: sees(own, all_, slot_Q + ahead, slot_S))
  assert peeks(thought)
