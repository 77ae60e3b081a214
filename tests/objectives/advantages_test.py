"""Every advantage of the table: its claims by enumerating all groups of thoughts, its invariances, its edge cases."""

import itertools
import math

import jax
import numpy as np
import pytest

from tests.objectives import bandit
from thinking_lm.objectives.advantages import ADVANTAGES, STD_FLOOR
from thinking_lm.objectives.baselines import BASELINES

CASES = [(name, G) for name in ADVANTAGES for G in (2, 3)]
RNG = np.random.default_rng(0)
REWARD_BGN = RNG.normal(size=(5, 4, 3)) - 2


WITHIN = [name for name, member in ADVANTAGES.items() if name != "none" and not member.baseline]
"""Members whose baseline is the group's."""


def of(name, reward_BGN, baseline=0.0):
  """The member's advantage; `baseline` for those whose baseline is not the group's."""
  with jax.enable_x64(True):
    against = (jax.numpy.asarray(baseline),) if ADVANTAGES[name].baseline else ()
    return np.asarray(ADVANTAGES[name].of(jax.numpy.asarray(reward_BGN), *against))


def tables():
  """(pi, outcome), each [C, Z]."""
  with jax.enable_x64(True):
    params = bandit.parameters()
    return np.asarray(jax.nn.softmax(params["policy_CZ"])), np.asarray(bandit.outcomes(params))


def expected_score(name, G, reward_CZ, policy_CZ):
  """Gradient of the expected score term to the policy's logits: sum over all groups, one by one."""
  rows = bandit.groups(G)
  c_B, z_BG = rows[:, 0], rows[:, 1:]
  baseline_B = reward_CZ.mean(axis=1)[c_B]  # knows the context and no thought
  advantage_BG = of(name, reward_CZ[c_B[:, None], z_BG][:, :, None], baseline_B[:, None, None])[:, :, 0]
  probability_B = policy_CZ[c_B[:, None], z_BG].prod(axis=1)
  grad_log_BGZ = np.eye(bandit.Z)[z_BG] - policy_CZ[c_B][:, None]
  row_BZ = probability_B[:, None] * (advantage_BG[:, :, None] * grad_log_BGZ).mean(axis=1)
  return np.stack([row_BZ[c_B == c].sum(axis=0) for c in range(bandit.C)])


def exact_score(name, G, reward_CZ, policy_CZ):
  """What it claims to estimate: the gradient of E r, or of E L_G with the probabilities of outcomes held fixed."""
  if ADVANTAGES[name].bound != "M":
    return policy_CZ * (reward_CZ - (policy_CZ * reward_CZ).sum(axis=1, keepdims=True))
  total_CZ = np.zeros((bandit.C, bandit.Z))
  for c, *thoughts in bandit.groups(G):
    bound = math.log(sum(math.exp(reward_CZ[c, z]) for z in thoughts) / G)
    probability = math.prod(policy_CZ[c, z] for z in thoughts)
    for z in thoughts:
      total_CZ[c] += probability * bound * (np.eye(bandit.Z)[z] - policy_CZ[c])
  return total_CZ


@pytest.mark.parametrize("name,G", CASES)
def test_claims_hold_both_ways(name, G):
  policy_CZ, outcome_CZ = tables()
  got, exact = (f(name, G, outcome_CZ, policy_CZ) for f in (expected_score, exact_score))
  scale, size = ADVANTAGES[name].scale, np.abs(exact).max()
  equal = np.allclose(got, exact, rtol=1e-4, atol=1e-4 * size)
  assert equal == ADVANTAGES[name].unbiased
  if scale:
    np.testing.assert_allclose(got, scale(G) * exact, rtol=1e-4, atol=1e-10 * size)
  elif ADVANTAGES[name].bound is None and G > 2:  # of two, many things are a mean
    cosine = (got * exact).sum() / np.linalg.norm(got) / np.linalg.norm(exact)
    assert cosine < 0.999, "its direction is another: a member that is only scaled should say so"


@pytest.mark.parametrize("name", ADVANTAGES)
def test_needs_is_the_smallest_group_that_gives_a_signal(name):
  needs = ADVANTAGES[name].needs
  enough = of(name, REWARD_BGN[:, :needs])
  assert np.isfinite(enough).all() and np.abs(enough).max() > 0
  if needs > 1:
    try:
      fewer = of(name, REWARD_BGN[:, : needs - 1])
    except ZeroDivisionError:
      return
    assert not np.isfinite(fewer).all() or np.abs(fewer).max() == 0


def is_each_rows_own(name):
  """Whether a group's advantages are what they are without the other groups of the batch."""
  alone_BGN = np.concatenate([of(name, REWARD_BGN[b : b + 1]) for b in range(len(REWARD_BGN))])
  return np.allclose(of(name, REWARD_BGN), alone_BGN, rtol=1e-12)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_group_has_one_rows_samples(name):
  """A group whose samples had the ids of other prompts would be no group (Search-R1's failure)."""
  assert is_each_rows_own(name)


@pytest.mark.parametrize("name", WITHIN)
def test_samples_that_are_of_another_row_are_found(name, monkeypatch):
  """Every sample but the first is taken from the next row, and the advantages are given back to where these are."""

  def permuted(reward_BGN):
    ids_BG = (np.arange(len(reward_BGN))[:, None] + np.arange(reward_BGN.shape[1]).clip(max=1)) % len(reward_BGN)
    mixed_BGN = ADVANTAGES[name].of(reward_BGN[ids_BG, np.arange(reward_BGN.shape[1])])
    return jax.numpy.zeros_like(mixed_BGN).at[ids_BG, np.arange(reward_BGN.shape[1])].set(mixed_BGN)

  monkeypatch.setitem(ADVANTAGES, "permuted", ADVANTAGES[name]._replace(of=permuted))
  assert not is_each_rows_own("permuted")


@pytest.mark.parametrize("name", WITHIN)
def test_a_constant_of_the_group_changes_nothing(name):
  shift_B1N = RNG.normal(size=(5, 1, 3))
  np.testing.assert_allclose(of(name, REWARD_BGN + shift_B1N), of(name, REWARD_BGN), atol=1e-12)


@pytest.mark.parametrize("name", [name for name, member in ADVANTAGES.items() if member.bound is None])
def test_scaling_of_rewards(name):
  """An advantage is in the unit of its reward, or has none; not for M, whose rewards are logarithms."""
  got, before = of(name, 3 * REWARD_BGN), of(name, REWARD_BGN)
  assert np.allclose(got, 3 * before, rtol=1e-12) != np.allclose(got, before, rtol=1e-12)


@pytest.mark.parametrize("name", [name for name, member in ADVANTAGES.items() if member.baseline])
def test_a_baseline_from_outside_is_taken_off(name):
  baseline_B1N = RNG.normal(size=(5, 1, 3))
  np.testing.assert_allclose(of(name, REWARD_BGN, baseline_B1N), REWARD_BGN - baseline_B1N, rtol=1e-12)
  assert ADVANTAGES[name].baseline in BASELINES and ADVANTAGES[name].needs == 1


@pytest.mark.parametrize("name", ADVANTAGES)
def test_linear_members_add_what_is_added_to_one_reward(name):
  """A_g = r_g - b(others): more for g alone is as much more in A_g. True of members that say so, and of no others."""
  more_BGN = np.zeros_like(REWARD_BGN)
  more_BGN[:, 1] = 0.37
  difference_BN = (of(name, REWARD_BGN + more_BGN) - of(name, REWARD_BGN))[:, 1]
  assert np.allclose(difference_BN, 0.37, rtol=1e-9) == ADVANTAGES[name].linear


@pytest.mark.parametrize("name", ADVANTAGES)
def test_samples_are_exchangeable_and_groups_are_independent(name):
  order = [2, 0, 3, 1]
  whole = of(name, REWARD_BGN)
  np.testing.assert_allclose(of(name, REWARD_BGN[:, order]), whole[:, order], atol=1e-12)
  np.testing.assert_allclose(of(name, REWARD_BGN[2:3, :, 1:2]), whole[2:3, :, 1:2], atol=1e-12)


@pytest.mark.parametrize("name", WITHIN)
@pytest.mark.parametrize("reward_G", [[-4.0] * 3, [-900.0, -1.0, -901.0], [0.0, -900.0, -900.0]])
def test_extreme_groups_stay_finite(name, reward_G):
  got = of(name, np.float32(reward_G)[None, :, None])
  assert np.isfinite(got).all()
  if len(set(reward_G)) == 1:
    np.testing.assert_allclose(got, 0, atol=1e-5)


def test_rlp_is_leave_one_out():
  for G in (2, 3, 4):
    np.testing.assert_allclose(of("rlp", REWARD_BGN[:, :G]), of("leave_one_out", REWARD_BGN[:, :G]), rtol=1e-12)


def test_grpo_is_the_z_score_above_its_floor():
  for b, n in itertools.product(range(5), range(3)):
    group = REWARD_BGN[b, :, n]
    expected = (group - group.mean()) / np.sqrt(((group - group.mean()) ** 2).mean())
    np.testing.assert_allclose(of("grpo", REWARD_BGN)[b, :, n], expected, rtol=1e-12)
  nearly = np.array([[[0.0], [STD_FLOOR / 100]]])
  np.testing.assert_allclose(of("grpo", nearly)[0, :, 0], [-0.005, 0.005], rtol=1e-9)


def test_the_floor_can_be_set_for_rewards_that_differ_by_less():
  """Probabilities of an unlikely outcome differ twenty-fold and by less than the default."""
  reward_BGN = np.array([1e-4, 1e-3, 2e-4, 5e-5]).reshape(1, 4, 1)
  z = (reward_BGN - reward_BGN.mean()) / reward_BGN.std()
  np.testing.assert_allclose(ADVANTAGES["grpo"].of(reward_BGN, floor=1e-6), z, rtol=1e-4)
  assert np.abs(of("grpo", reward_BGN)).max() < 0.5 * np.abs(z).max()
  assert not ADVANTAGES["dapo"].keep(reward_BGN).any() and ADVANTAGES["dapo"].keep(reward_BGN, 1e-6).all()


def test_quiet_star_never_discourages():
  assert of("quiet_star", REWARD_BGN).min() == 0 < of("quiet_star", REWARD_BGN).max()
  np.testing.assert_array_equal(of("quiet_star", REWARD_BGN), np.maximum(of("mean", REWARD_BGN), 0))


def test_dapo_keeps_the_groups_that_vary():
  reward_BGN = np.array([[0.0, 1.0], [1.0, 1.0], [0.0, STD_FLOOR], [0.0, 3 * STD_FLOOR]])[:, :, None]
  np.testing.assert_array_equal(ADVANTAGES["dapo"].keep(reward_BGN)[:, 0], [True, False, False, True])
  assert [name for name, member in ADVANTAGES.items() if member.keep] == ["dapo"]


@pytest.mark.parametrize("G", [2, 3, 4])
def test_vimco_and_jepo_by_brute_force(G):
  for b, n in itertools.product(range(5), range(3)):
    logs = [float(reward) for reward in REWARD_BGN[b, :G, n]]
    bound = math.log(sum(map(math.exp, logs)) / G)
    for g in range(G):
      others = logs[:g] + logs[g + 1 :]
      probabilities = [math.exp(other) for other in others]
      geometric = math.prod(probabilities) ** (1 / (G - 1))
      vimco = bound - math.log((sum(probabilities) + geometric) / G)
      jepo = bound - math.log(sum(probabilities) / (G - 1))
      np.testing.assert_allclose(of("vimco", REWARD_BGN[:, :G])[b, g, n], G * vimco, rtol=1e-9, atol=1e-12)
      np.testing.assert_allclose(of("jepo", REWARD_BGN[:, :G])[b, g, n], G * jepo, rtol=1e-9, atol=1e-12)
