"""Every sign on thoughts that show the failure and on thoughts that do not; every rule on a run that fails that way."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.objectives import bandit
from thinking_lm import config as config_lib
from thinking_lm.objectives import health
from thinking_lm.objectives.health import SIGNS, HealthConfig, History, rules, signs
from thinking_lm.objectives.objective import ObjectiveConfig, objective
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.training.alarms import Watch
from thinking_lm.types import Thoughts, Trace

B, G, N, n, D = 2, 4, 3, 3, 8


def trace(tokens_BGNJ=None, inputs_BGNJD=None, used=n, valid_BN=None) -> Trace:
  """A trace with these thoughts; random ones by default."""
  rng = np.random.default_rng(0)
  tokens = rng.permutation(10**4)[: B * G * N * n].reshape(B, G, N, n) if tokens_BGNJ is None else tokens_BGNJ
  inputs = rng.normal(size=(*np.shape(tokens), D)) if inputs_BGNJD is None else inputs_BGNJD
  blank = dict.fromkeys(Trace.__dataclass_fields__)
  valid_BN = np.ones((B, N), bool) if valid_BN is None else valid_BN
  thoughts = Thoughts(jnp.asarray(inputs, jnp.float32), jnp.asarray(tokens, jnp.int32))
  used_BGN = jnp.asarray(np.broadcast_to(used, tokens.shape[:3]), jnp.int32) * valid_BN[:, None]
  return Trace(**blank | dict(thoughts=thoughts, used_BGN=used_BGN, valid_BN=jnp.asarray(valid_BN)))


RULE_NAMES = rules(HealthConfig(entropy_stop=0.05, snr=0.1), 40, False).keys()


def thought(**changes) -> ThoughtConfig:
  """Four samples of three tokens that may stop."""
  return ThoughtConfig(**dict(kind="sampled", length=n, samples=G, halting="stop") | changes)


def read(name, *arguments) -> float:
  """A sign as a number."""
  return float(SIGNS[name].of(*arguments))


def test_signs_read_healthy_thoughts():
  found = {name: float(sign) for name, sign in signs(trace(), thought()).items()}
  assert found == dict(empty_thoughts=0, full_thoughts=1, repeated_tokens=0, distinct_thoughts=1)
  assert set(signs(trace(), thought(kind="latent", halting="fixed", samples=1))) == {
    "thought_scale",
    "successive_cosine",
  }
  assert set(signs(trace(), thought(kind="noisy", halting="fixed"))) == {"thought_scale", "successive_cosine"}
  assert set(signs(trace(), thought(kind="pause", halting="ponder", samples=1))) == {"empty_thoughts", "full_thoughts"}
  assert set(signs(trace(), thought(kind="pause", halting="router", samples=1))) == {"empty_thoughts"}
  assert signs(trace(), ThoughtConfig()) == {}


def test_thoughts_that_stop_at_once_are_empty_and_invalid_ones_do_not_count():
  used = np.zeros((B, G, N), int)
  used[0, 0, 0] = n
  valid_BN = np.array([[True, True, False], [True, False, False]])
  assert read("empty_thoughts", trace(used=used, valid_BN=valid_BN), thought()) == pytest.approx(11 / 12)
  assert read("full_thoughts", trace(used=used, valid_BN=valid_BN), thought()) == pytest.approx(1 / 12)


def test_one_token_over_and_over_is_a_repetition_up_to_the_stop():
  tokens = np.tile([7, 7, 3], (B, G, N, 1))
  assert read("repeated_tokens", trace(tokens), thought()) == pytest.approx(1 / 2)
  assert read("repeated_tokens", trace(tokens, used=2), thought()) == 1
  one = np.broadcast_to(np.array([5, 5, 6])[:, None], (B, G, N, 1))
  assert read("repeated_tokens", trace(one, used=1), thought(length=1)) == pytest.approx(1 / 2)


@pytest.mark.parametrize(
  "tokens,used,expected",
  [
    ("ababab", 6, 3 / 4),
    ("aaaaaa", 6, 1),
    ("abcdef", 6, 0),
    ("abcabc", 6, 1 / 2),
    ("abacad", 6, 0),
    ("ababab", 4, 1 / 2),
    ("ababab", 1, 0),
    ("abacab", 6, 1 / 4),
  ],
)
def test_pairs_of_tokens_that_stood_before_are_circles_up_to_the_stop(tokens, used, expected):
  tokens = np.broadcast_to([ord(letter) for letter in tokens], (B, G, N, 6))
  found = SIGNS["repeated_pairs"].of(trace(tokens, used=used), thought(length=6))
  assert float(found) == pytest.approx(expected) and float(found.count) == B * G * N * max(used - 2, 0)
  assert not SIGNS["repeated_pairs"].needs(thought(length=5)), "too short to tell"


def test_a_group_that_thinks_one_thing_has_one_distinct_thought():
  tokens = np.array(trace().thoughts.tokens_BGNJ)
  tokens[:] = tokens[:, :1]
  assert read("distinct_thoughts", trace(tokens), thought()) == pytest.approx(1 / G)
  tokens[:, 3, :, 0] = -5
  assert read("distinct_thoughts", trace(tokens), thought()) == pytest.approx(2 / G)
  tokens[:, 3, :, 0], tokens[:, 3, :, 2] = tokens[:, 0, :, 0], -5  # they differ behind the STOP only
  assert read("distinct_thoughts", trace(tokens, used=2), thought()) == pytest.approx(1 / G)


@pytest.mark.parametrize("length", [1, 3])
def test_latents_that_stand_still_have_cosine_one(length):
  still = np.broadcast_to(np.linspace(1, 2, D), (B, 1, N, length, D))
  tokens = np.full((B, 1, N, length), -1)
  latent = thought(kind="latent", length=length, samples=1, halting="fixed")
  growing = still * (1 + np.arange(N))[:, None, None]
  assert read("successive_cosine", trace(tokens, growing, used=length), latent) == pytest.approx(1)
  turned = np.where(np.arange(D) < D // 2, 1.0, -1.0) * np.where(np.arange(N) % 2, 1.0, 0.5)[:, None, None]
  assert read("successive_cosine", trace(tokens, still * turned, used=length), latent) == pytest.approx(1)
  turned[1] *= -1
  expected = -1 if length == 1 else 1
  assert read("successive_cosine", trace(tokens, still * turned, used=length), latent) == pytest.approx(expected)
  assert read("thought_scale", trace(tokens, 3 * np.ones_like(still), used=length), latent) == pytest.approx(3)


HEALTHY = dict(
  think_entropy=2.0, empty_thoughts=0.1, full_thoughts=0.3, repeated_tokens=0.1, successive_cosine=0.5, flat_groups=0.2,
  kl=0.01, nll_grad_norm=1.0, score_grad_norm=0.5, sampler_mismatch=1e-6, effect_none=0.2, reward=-2.0,
  length_reward=0.1, chain_grad_first=0.1, chain_grad_last=2.0, repeated_pairs=0.1, distinct_thoughts=0.9,
  thought_rank=3.0, approx_kl=0.01, clip_fraction=0.1, effect_shuffled=0.15, effect_pause=0.1,
  think_entropy_lowest=1.0, sampler_ratio=1.001, score_grad_snr=0.5,
)  # fmt: skip
FAILURES = dict(
  entropy_low=dict(think_entropy=0.5),
  entropy_high=dict(think_entropy=3.1),
  entropy_uniform=dict(think_entropy=0.95 * math.log(40)),
  entropy_place=dict(think_entropy_lowest=0.05),
  empty=dict(empty_thoughts=0.9),
  full=dict(full_thoughts=0.6),
  repeated=dict(repeated_tokens=0.95),
  looped=dict(repeated_pairs=0.75),
  distinct=dict(distinct_thoughts=0.3),
  rank=dict(thought_rank=0.0),
  scale=dict(thought_scale=7.0),
  alike=dict(successive_cosine=0.9995),
  flat=dict(flat_groups=0.95),
  lengthy=dict(length_reward=0.95),
  drift=dict(kl=0.2),
  leap=dict(approx_kl=0.2),
  clipped=dict(clip_fraction=0.6),
  gradients=dict(score_grad_norm=1e-4),
  chain=dict(chain_grad_first=1e-3),
  mismatch=dict(sampler_mismatch=1e-3),
  ratio=dict(sampler_ratio=0.98),
  effect=dict(effect_none=-0.01, reward=-1.0),
  content=dict(effect_shuffled=0.01),
)


def alarms_of(rows, config=None):
  """Names of the alarms that a run raises."""
  config = config or HealthConfig()
  watch, found = Watch(rules(config, 40, False, samples=G), History, config.patience), {}
  for step, row in enumerate(rows):
    found |= watch(step, row)
  return {name.removeprefix("alarm_") for name, raised in found.items() if raised}


@pytest.mark.parametrize("name", FAILURES)
def test_each_rule_sees_its_failure_and_nothing_else_does(name):
  rows = [HEALTHY] * 12
  assert alarms_of(rows) == set()
  assert alarms_of(rows + [HEALTHY | FAILURES[name]] * 2) == set()  # not yet for long enough
  found = alarms_of(rows + [HEALTHY | FAILURES[name]] * 3)
  assert found - {"entropy_high", "entropy_uniform"} == {name} - {"entropy_high", "entropy_uniform"} and name in found


def test_a_gradient_of_noise_is_said_where_a_threshold_asks():
  rows = [HEALTHY | dict(score_grad_snr=-0.01)] * 3
  assert alarms_of(rows) == set() and alarms_of(rows, HealthConfig(snr=0.1)) == {"snr"}


def test_all_rules_are_tested_and_each_can_be_switched_off():
  assert set(FAILURES) | {"entropy_stop", "snr"} == set(RULE_NAMES)
  off = HealthConfig(**{name: False if name == "effect" else 0.0 for name in RULE_NAMES if name not in ALWAYS})
  assert set(rules(off, 40, False)) == ALWAYS
  assert {field.name for field in dataclasses.fields(HealthConfig)} >= set(RULE_NAMES), "what an alarm names"


ALWAYS = {"mismatch"}


@pytest.mark.parametrize("slope,expected", [(1.0, 1.0), (-0.5, -1.0), (0.0, 0.0)])
def test_pay_for_length_is_a_correlation(slope, expected):
  """Of groups in which both vary; the others do not count."""
  trace = bandit.trace(bandit.parameters(), bandit.groups(2))
  used = np.random.default_rng(0).integers(5, size=trace.used_BGN.shape)
  config = ObjectiveConfig(score_weight=1.0, advantage="leave_one_out")
  told = objective(config, trace.replace(used_BGN=jnp.asarray(used), outcome_BGN=jnp.asarray(slope * used)))[1]
  found, differ = told["length_reward"], (used[:, 0] != used[:, 1]) & (slope != 0)
  assert float(found) == pytest.approx(expected, abs=1e-5) and float(found.count) == np.sum(differ)


def test_a_reward_that_rises_with_an_effect_is_fine_and_so_is_no_effect_without_reward():
  assert alarms_of([HEALTHY] + [HEALTHY | dict(reward=-1.0)] * 5) == set()
  assert alarms_of([HEALTHY] + [HEALTHY | dict(effect_none=-0.1, reward=-3.0)] * 5) == set()


def test_a_gain_must_hang_on_the_content_of_thoughts_once_there_is_one():
  assert alarms_of([HEALTHY | dict(effect_pause=-0.1)] * 3) == {"content"}
  assert alarms_of([HEALTHY | dict(effect_none=0.009, effect_shuffled=0.0)] * 3) == set()
  assert alarms_of([HEALTHY | dict(effect_none=-1.0, effect_shuffled=-1.0)] * 3) == set()


@pytest.mark.parametrize("samples", [2, 8])
def test_one_thought_in_a_group_is_too_few_however_large_the_group(samples):
  rule = rules(HealthConfig(), 40, False, samples=samples)["distinct"]
  assert rule.broken(1 / samples) and not rule.broken(1.2 / samples if samples < 8 else 2 / samples)


def test_thoughts_that_draw_no_tokens_have_no_entropy_to_lose():
  assert not any("entropy" in name for name in rules(HealthConfig(entropy_stop=0.1), 40, False, tokens=False))


def test_half_precision_is_allowed_a_larger_mismatch():
  assert rules(HealthConfig(), 40, True)["mismatch"].high == 0.05
  assert rules(HealthConfig(mismatch=0.2), 40, True)["mismatch"].high == 0.2


def test_thresholds_are_checked_like_all_options():
  with pytest.raises(config_lib.ConfigError, match=r"empty must be at most 1"):
    config_lib.parse(HealthConfig, dict(empty=1.5))


def test_signs_cost_no_gradient():
  def loss(x):
    made = trace(inputs_BGNJD=jnp.broadcast_to(x, (B, G, N, n, D)))
    return sum(sign.total for sign in signs(made, thought(kind="latent", samples=1, halting="fixed")).values())

  assert jax.grad(loss)(1.5) == 0
  assert health.History(1.0, (1.0, 2.0)).last == 2.0
