"""Every reward against its definition, on the tables of the bandit and on what the real rollout hands over."""

import jax
import numpy as np
import pytest

from tests.objectives import bandit, tiny
from thinking_lm.objectives.objective import ObjectiveConfig
from thinking_lm.objectives.rewards import REWARDS, paid

OUTCOMES = [name for name, member in REWARDS.items() if not member.answer]
"""Rewards of answers are in answers_test.py."""


@pytest.fixture(scope="module")
def trace():
  with jax.enable_x64(True):
    return jax.device_get(bandit.traced(bandit.groups(2)))


def by_hand(name, trace, b, g):
  """The reward of one thought, from the log-probabilities of its two targets."""
  logs = [trace.logp_BGT[b, g, 0], trace.ahead_logp_BGNA[b, g, 0, 0]]
  if name == "exact_match":
    params, c, z = bandit.parameters(), *bandit.groups(2)[b, [0, 1 + g]]
    return all(np.argmax(params["reader_CZMY"][c, z, m]) == bandit.TARGETS_CM[c, m] for m in range(bandit.M))
  if name == "proper_score":
    return by_hand_brier(*bandit.groups(2)[b, [0, 1 + g]])
  return dict(log_prob=sum(logs), info_gain=sum(logs) - trace.base_outcome_BN[b, 0], prob=np.prod(np.exp(logs)))[name]


def by_hand_brier(c, z):
  """Weight of the target times the Brier score of what bandit.report says."""
  said = {z % 3: z / 5} | {2: 0.3}
  scale = max(sum(said.values()), 1)
  other = (1 - sum(said.values()) / scale) / (5 - len(said))
  target = bandit.TARGETS_CM[c, 0]
  squares = [(said.get(v, other * scale) / scale - (v == target)) ** 2 for v in range(5)]
  return -(0.5 + c) * sum(squares)


def of(trace, **options):
  return np.asarray(jax.jit(paid, static_argnums=0)(ObjectiveConfig(**options), trace))


@pytest.mark.parametrize("name", OUTCOMES)
def test_rewards_by_hand(name, trace):
  reward_BGN = of(trace, reward=name)
  for b in range(0, len(reward_BGN), 7):
    for g in range(2):
      np.testing.assert_allclose(reward_BGN[b, g, 0], by_hand(name, trace, b, g), rtol=1e-6)
  assert len(np.unique(reward_BGN)) > 1


@pytest.mark.parametrize("name", OUTCOMES)
def test_what_the_table_says_of_a_reward(name, trace):
  """smooth: it has a slope in the outcome. base: it changes with the prediction without a thought."""
  of_outcome = jax.jit(jax.grad(lambda outcome: REWARDS[name].of(scored.replace(outcome_BGN=outcome)).sum()))
  with jax.enable_x64(True):
    scored = trace.replace(score_BGN=trace.outcome_BGN * 0)
    assert REWARDS[name].smooth == bool(np.any(of_outcome(trace.outcome_BGN)))
    told = [REWARDS[name].of(scored.replace(base_outcome_BN=trace.base_outcome_BN + by)) for by in (0.0, 1.0)]
  assert REWARDS[name].base == (not np.array_equal(*told))


@pytest.mark.parametrize("name", OUTCOMES)
def test_every_think_token_costs_its_price(name, trace):
  difference_BGN = of(trace, reward=name) - of(trace, reward=name, price=0.25)
  np.testing.assert_allclose(difference_BGN, 0.25 * trace.used_BGN, atol=1e-6)


@pytest.mark.parametrize("name", OUTCOMES)
def test_calibration_is_paid_for_beside_any_reward(name, trace):
  difference_BGN = of(trace, reward=name, calibration_weight=2.0) - of(trace, reward=name)
  np.testing.assert_allclose(difference_BGN, 2 * of(trace, reward="proper_score"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("topology", ["persistent", "private"])
def test_the_rollout_tells_what_rewards_need(topology):
  """Outcomes, hits and the pass without thoughts are those of the targets that the look-ahead reaches."""
  trace = tiny.rolled(topology)
  G = trace.logp_BGT.shape[1]
  seen = set()
  for g in range(G):
    for n, anchor in enumerate(tiny.ANCHORS):
      targets = [t for t in tiny.outcome_of(topology, anchor) if tiny.WEIGHTS[t]]
      if topology == "persistent":
        logs, hits = trace.logp_BGT[0, g, targets], trace.hit_BGT[0, g, targets]
        np.testing.assert_allclose(
          trace.outcome_BGN[0, g, n], (logs * tiny.WEIGHTS[targets]).sum(), rtol=1e-5, atol=1e-6
        )
        assert trace.outcome_hit_BGN[0, g, n] == hits.all()
        seen.add(bool(hits.all()))
      else:
        base = (trace.base_logp_BT[0, targets] * tiny.WEIGHTS[targets]).sum()
        np.testing.assert_allclose(trace.base_outcome_BN[0, n], base, rtol=1e-5, atol=1e-6)
        first = trace.hit_BGT[0, g, anchor] or not tiny.WEIGHTS[anchor]
        if not first:
          assert not trace.outcome_hit_BGN[0, g, n]
        if len(targets) == 1 and targets == [anchor]:
          assert trace.outcome_hit_BGN[0, g, n] == first
        seen.add(bool(trace.outcome_hit_BGN[0, g, n]))
  assert seen == {False, True}, "the problem should show both"
