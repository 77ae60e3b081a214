"""The one objective: a choice of bound, reward, advantage, and the weights of the two terms of its gradient.

    grad J = E_z[ (log p(y|x,z) - b) grad log pi(z|x)  +  grad log p(y|x,z) ]
             score term, "RL" (score_weight)              pathwise term, "real gradient" (nll_weight)

That is bound J with reward log_prob; bounds M and P have both terms too (bounds.py). The value that is returned is a
sum over the real targets; whoever takes the gradient divides by the number of targets of the whole global batch, so
that micro-batches and devices add up.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from thinking_lm.config import option
from thinking_lm.metrics import Mean
from thinking_lm.objectives import exits
from thinking_lm.objectives.advantages import ADVANTAGES, STD_FLOOR, leave_one_out, varied
from thinking_lm.objectives.baselines import BASELINES, reward_of
from thinking_lm.objectives.bounds import BOUNDS
from thinking_lm.objectives.policy import ESTIMATORS, RATIOS, approximate_kl, bounded_exp, surrogate
from thinking_lm.objectives.rewards import REWARDS, prefix_match
from thinking_lm.objectives.scores import SCORES, score
from thinking_lm.objectives.variates import VARIATES, variance
from thinking_lm.types import Batch, Beside, Params, Trace, Vocabulary

NOTHING = Beside()
"""Of an objective that asks for no other pass."""

MIX_BINS = 5
"""Of the histogram of mixing weights."""


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """The objective. Real gradients only: nll_weight 1, score_weight 0. Policy gradient only: the reverse."""

  nll_weight: float = option(1.0, "of -log p(target) with thoughts, differentiated through them where they allow it")
  score_weight: float = option(0.0, "of the policy-gradient term; needs kind sampled", low=0)
  base_weight: float = option(0.0, "of -log p(target) without thoughts; needs topology private", low=0)
  entropy_weight: float = option(0.0, "of a thought's entropy, mean nats of its tokens; needs kind sampled", low=0)
  entropy_steps: int = option(0, "training steps over which entropy_weight falls to 0 in a line; 0: it stays", low=0)
  bound: str = option("J", "which expectation over thoughts the NLL term maximises", choices=BOUNDS)
  reward: str = option("log_prob", "what the score term pays a thought for", choices=REWARDS)
  price: float = option(0.0, "what a think token costs a thought, in units of the reward", low=0)
  halt_weight: float = option(0.0, "halting=ponder, router: of KL(where thoughts end || geometric prior)", low=0)
  halt_prior: float = option(0.2, "that prior's probability of ending at each exit", above=0, high=0.999)
  scoring: str = option("brier", "which scoring rule judges what a thought reports", choices=SCORES)
  calibration_weight: float = option(0.0, "of that score in the reward; needs thought.report", low=0)
  advantage: str = option("leave_one_out", "how the score term centres rewards", choices=ADVANTAGES)
  std_floor: float = option(
    STD_FLOOR, "rewards of a group whose standard deviation is below are the same: to grpo, dapo, flat_groups", above=0
  )
  control: float = option(0.0, "weight of a control variate in the score term, see thought.relaxation", low=0)
  variate: str = option("rebar", "control above 0: its variate, the relaxed reward or a learned one", choices=VARIATES)
  exact: bool = option(False, "draw nothing: nll_weight weighs the bound itself, summed over every thought there is")
  baseline_decay: float = option(0.99, "advantages ema, value: of the running mean of rewards, per update", low=0)
  value_weight: float = option(0.5, "advantage value: of the head's squared error, in squared units of reward", above=0)
  teacher_decay: float = option(
    0.0,
    "reward info_gain: against a moving average of the parameters with this decay per update; 0: the same model",
    low=0,
    high=1,
  )
  ratio: str = option("token", "train.updates above 1: what has an importance ratio of its own", choices=RATIOS)
  clip_low: float = option(0.2, "train.updates above 1: ratios are clipped at 1 - this ...", low=0, high=1)
  clip_high: float = option(0.28, "... and at 1 + this", low=0)
  kl_weight: float = option(0.0, "of the divergence from the reference policy, nats per thought", low=0)
  kl_estimator: str = option("k3", "how it is estimated from the drawn tokens", choices=ESTIMATORS)
  kl_reference: str = option("", "work directory of the reference; empty: the parameters that this run starts with")

  def faults(self) -> list[str]:
    """Rules across fields."""
    found = []
    if self.nll_weight < 0:
      found.append("nll_weight must not be negative")
    elif not (self.nll_weight or self.score_weight or self.base_weight):
      found.append("nll_weight, score_weight and base_weight are all 0: there is nothing to learn")
    if self.baseline_decay >= 1:
      found.append(f"baseline_decay must be below 1, got {self.baseline_decay}")
    if self.teacher_decay and not (self.score_weight and REWARDS[self.reward].base):
      found.append("teacher_decay is read by the rewards that compare with no thought: info_gain, under a score_weight")
    if self.kl_reference and not self.kl_weight:
      found.append("kl_reference is read where kl_weight is above 0")
    if self.variate != "rebar" and not self.control:
      found.append(f"variate {self.variate!r} is read where control is above 0")
    if self.entropy_steps and not self.entropy_weight:
      found.append("entropy_steps is read where entropy_weight is above 0")
    changed = lambda *names: [name for name in names if getattr(self, name) != getattr(ObjectiveConfig, name)]
    if not self.score_weight:
      found += [
        f"{name} {getattr(self, name)!r} is read by the score term, whose score_weight is 0"
        for name in changed("reward", "advantage", "std_floor")
      ]
    if not self.kl_weight and changed("kl_estimator"):
      found.append(f"kl_estimator {self.kl_estimator!r} is read where kl_weight is above 0")
    if ADVANTAGES[self.advantage].baseline != "value" and changed("value_weight"):
      found.append(f"value_weight is read by advantage 'value', got {self.advantage!r}")
    if self.exact and self.score_weight:
      found.append("exact has both terms of the gradient in the value that nll_weight weighs: set score_weight to 0")
    return found + (self._mismatches() if self.score_weight else []) + (self._control_faults() if self.control else [])

  def entropy_at(self, step):
    """entropy_weight at a training step, a number or traced: a policy explores while it is above 0."""
    if not self.entropy_steps:
      return self.entropy_weight
    return self.entropy_weight * jnp.maximum(1 - jnp.asarray(step, jnp.float32) / self.entropy_steps, 0)

  def _control_faults(self) -> list[str]:
    """Score terms from which a control variate cannot be taken without a bias."""
    found = []
    if not self.score_weight:
      found.append("control is a part of the score term, whose score_weight is 0")
    if not ADVANTAGES[self.advantage].linear:
      linear = ", ".join(name for name, member in ADVANTAGES.items() if member.linear)
      found.append(f"control needs an advantage that is r_g less a baseline, got {self.advantage!r}; known: {linear}")
    if VARIATES[self.variate].smooth and not REWARDS[self.reward].smooth:
      smooth = ", ".join(name for name, member in REWARDS.items() if member.smooth)
      found.append(
        f"variate {self.variate!r} needs a reward that is a smooth function of the outcome, got {self.reward!r}; "
        f"known: {smooth}"
      )
    return found

  def _mismatches(self) -> list[str]:
    """Score terms that are no part of the bound's gradient."""
    rewards, member = BOUNDS[self.bound].rewards, ADVANTAGES[self.advantage]
    found = []
    if rewards and self.reward not in rewards:
      found.append(f"bound {self.bound!r} pays for {' or '.join(rewards)}, got reward {self.reward!r}")
    if (self.bound == "M") != (member.bound == "M"):
      credits = ", ".join(name for name, other in ADVANTAGES.items() if (other.bound == "M") == (self.bound == "M"))
      found.append(
        f"advantage {self.advantage!r} does not credit bound {self.bound!r}, whose score term needs one of: {credits}"
      )
    if member.keep and (self.nll_weight or self.base_weight):
      found.append(
        f"advantage {self.advantage!r} averages over the groups that it keeps, which the NLL terms do not share: set "
        "nll_weight and base_weight to 0, or use 'grpo'"
      )
    return found


def estimating(params: Params) -> Params:
  """The parameters, without gradient for heads that learn from losses of their own, of a baseline or a variate.

  What these get estimates none of J, M and P.
  """
  heads = params.get("heads", {})
  taught = {member.head for member in (*BASELINES.values(), *VARIATES.values())} & heads.keys()
  if not taught:
    return params
  return params | dict(heads=heads | jax.lax.stop_gradient({name: heads[name] for name in taught}))


def objective(
  config: ObjectiveConfig,
  trace: Trace,
  beside: Beside = NOTHING,
  extra: Mapping[str, Any] = MappingProxyType({}),
  step=0,
) -> tuple[jax.Array, dict[str, Mean]]:
  """(loss summed over targets, metrics). `metrics["loss"]` holds that sum and the number of targets.

  Args:
    beside: what other passes over the same rows tell, as far as the config asks for it.
    extra: what is carried from earlier steps (carry.py). step: number of finished steps, for schedules.

  With `beside.drawn_logp_BGNJ` the thoughts were drawn by older parameters: the score term then has clipped importance
  ratios (policy.py), and rewards are those of the present reader. The other terms take the thoughts as they come: their
  expectation is over the policy that drew.

  Entropy bonus and divergence pull at each token's distribution given the tokens before it, and not at what led there.
  """
  count_B = trace.weights_BT.sum(axis=1)
  if trace.ahead_weights_BNA is not None:
    count_B += trace.ahead_weights_BNA.sum(axis=(1, 2))
  metrics = describe(trace)
  if trace.exit_logp_BGNK is None:
    loss = -config.nll_weight * BOUNDS[config.bound].value(trace)
  else:
    loss = -config.nll_weight * exits.value(trace, config.price, config.halt_weight, config.halt_prior)
    valid_BGN = jnp.broadcast_to(trace.valid_BN[:, None], trace.outcome_BGN.shape)
    metrics["halt_length"] = Mean.of(jax.lax.stop_gradient(exits.settled(trace)).used_BGN, valid_BGN)
    metrics["halt_kl"] = Mean.of(jax.lax.stop_gradient(exits.divergence(trace, config.halt_prior)), valid_BGN)
  if config.base_weight:
    loss -= config.base_weight * jnp.sum(trace.base_logp_BT * trace.weights_BT)
  keep_BN = trace.valid_BN
  if config.score_weight:
    term, keep_BN, told = _score(config, trace, beside, extra)
    loss += term
    metrics |= told
    if ADVANTAGES[config.advantage].keep:
      # Rows are never split between devices or micro-batches, so that the counts of a global batch add up.
      count_B *= keep_BN.sum(axis=1) / jnp.maximum(trace.valid_BN.sum(axis=1), 1)
  if config.entropy_weight:
    loss -= config.entropy_at(step) * jnp.sum(trace.entropy_BGN.mean(axis=1) * keep_BN)
  if config.kl_weight and beside.reference_logp_BGNJ is not None:
    delta_BGNJ = trace.token_logp_BGNJ - beside.reference_logp_BGNJ
    kl_BGN = {name: jnp.sum(one.of(delta_BGNJ) * trace.chosen_BGNJ, axis=-1) for name, one in ESTIMATORS.items()}
    loss += config.kl_weight * jnp.sum(kl_BGN[config.kl_estimator].mean(axis=1) * keep_BN)
    told = {f"kl_{name}": Mean.of(jax.lax.stop_gradient(kl), trace.valid_BN[:, None]) for name, kl in kl_BGN.items()}
    metrics |= told | dict(kl=told[f"kl_{config.kl_estimator}"])
  if beside.plain_logp_BT is not None:
    metrics["nll_teacher" if config.teacher_decay else "nll_base"] = Mean.of(-beside.plain_logp_BT, trace.weights_BT)
  return loss, metrics | dict(loss=Mean(loss, count_B.sum()))


def _score(config, trace, beside, extra):
  """(-score_weight sum over thoughts of A log pi(z) / G, keep_BN: the groups that the advantage keeps, metrics).

  With a value head, also its squared error; with a surrogate head, the variance that it leaves. Metrics: reward, its
  reward_std within a group, the share of flat_groups (whose thoughts are all paid the same, see `varied`),
  advantage_abs; length_reward, the correlation of think tokens and reward within a group, where both vary; with a value
  head value_explained,
  1 - its squared error / that of the running mean of rewards (1 is perfect, 0 no better than that mean); with a
  surrogate head variance_left, the mean square of the score term's gradient at the logits / that without the head.
  """
  member, (B, G, N) = ADVANTAGES[config.advantage], trace.outcome_BGN.shape
  reward_BGN = reward_of(config, trace, beside)
  credit_BGN, control_BGN = reward_BGN, jnp.zeros_like(reward_BGN)
  if config.control:
    control_BGN = config.control * VARIATES[config.variate].of(config, trace)
    credit_BGN -= jax.lax.stop_gradient(control_BGN)
  against = () if member.baseline is None else (BASELINES[member.baseline].of(config, trace, beside, extra),)
  advantage_BGN = _advantage(config, member, credit_BGN, against, trace, beside)
  keep_BN = trace.valid_BN & member.keep(reward_BGN, config.std_floor) if member.keep else trace.valid_BN
  score_BGN, moved = _likelihood(config, trace, beside, advantage_BGN)
  loss = -config.score_weight * (jnp.sum((score_BGN + control_BGN) * keep_BN[:, None]) / G)
  valid_BGN = jnp.broadcast_to(trace.valid_BN[:, None], (B, G, N))
  told = dict(
    reward=Mean.of(reward_BGN, valid_BGN),
    reward_std=Mean.of(reward_BGN.std(axis=1), trace.valid_BN),
    flat_groups=Mean.of(~varied(reward_BGN, config.std_floor), trace.valid_BN),
    advantage_abs=Mean.of(jnp.abs(advantage_BGN), valid_BGN),
    length_reward=_length_reward(trace.used_BGN.astype(jnp.float32), reward_BGN, trace.valid_BN, config.std_floor),
  )
  if config.control and VARIATES[config.variate].head:
    left = lambda weight: variance(
      member.of(reward_BGN - weight * trace.surrogate.learned_BGN, *against), weight, trace.surrogate
    )
    left_BN, plain_BN = left(config.control) * keep_BN, jax.lax.stop_gradient(left(0.0)) * keep_BN
    loss += jnp.sum(left_BN)
    told |= dict(variance_left=Mean(jnp.sum(left_BN), jnp.sum(plain_BN)))
  if member.baseline and BASELINES[member.baseline].head:
    error_BGN = jnp.square(trace.value_BGN - reward_BGN) * valid_BGN
    plain_BGN = jnp.square(BASELINES["running_mean"].of(config, trace, beside, extra) - reward_BGN) * valid_BGN
    loss += config.value_weight * jnp.sum(error_BGN) / G
    told |= dict(value_explained=Mean(jnp.sum(plain_BGN - error_BGN), jnp.sum(plain_BGN)))
  return loss, keep_BN, told | moved


def _advantage(config, member, credit_BGN, against, trace, beside):
  """A_g of a group. Of bound M, a logarithm over the group: its credit for the outcomes, and for what is added to each
  thought's reward (a price, a score of its report), whose mean over thoughts is an expectation, leave-one-out.
  """
  options = dict(floor=config.std_floor) if member.floored else {}
  if member.bound != "M" or not (config.price or config.calibration_weight):
    return member.of(credit_BGN, *against, **options)
  outcome_BGN = reward_of(dataclasses.replace(config, price=0.0, calibration_weight=0.0), trace, beside)
  return member.of(outcome_BGN) + leave_one_out(credit_BGN - outcome_BGN)


def _length_reward(used_BGN, reward_BGN, valid_BN, floor: float) -> Mean:
  """Correlation of length and reward within a group; the mean over groups in which both vary."""
  away = lambda x_BGN: x_BGN - x_BGN.mean(axis=1, keepdims=True)
  a, b = away(used_BGN), away(reward_BGN)
  scale_BN = jnp.sqrt(jnp.sum(a**2, axis=1) * jnp.sum(b**2, axis=1))
  both_BN = valid_BN & varied(used_BGN) & varied(reward_BGN, floor)
  return Mean.of(jnp.where(both_BN, jnp.sum(a * b, axis=1) / jnp.where(both_BN, scale_BN, 1.0), 0.0), both_BN)


def _likelihood(config, trace, beside, advantage_BGN):
  """(A log pi of each thought, or where older parameters drew them A times the clipped ratios; metrics of these).

  clip_fraction: ratios whose gradient the clip took away. ratio: their mean, 1 in expectation for tokens. approx_kl: of
  the policy that drew to the present one, nats per ratio.
  """
  if beside.drawn_logp_BGNJ is None:
    return advantage_BGN * trace.policy_logp_BGN, {}
  delta_BGNX = RATIOS[config.ratio](trace.token_logp_BGNJ - beside.drawn_logp_BGNJ)
  chosen_BGNX = trace.chosen_BGNJ[..., : delta_BGNX.shape[-1]]
  value_BGNX, cut_BGNX = surrogate(delta_BGNX, advantage_BGN[..., None], config.clip_low, config.clip_high)
  told = dict(
    clip_fraction=Mean.of(cut_BGNX, chosen_BGNX),
    ratio=Mean.of(bounded_exp(delta_BGNX), chosen_BGNX),
    approx_kl=Mean.of(approximate_kl(delta_BGNX), chosen_BGNX),
  )
  return jnp.sum(value_BGNX * chosen_BGNX, axis=-1), told


def describe(trace: Trace) -> dict[str, Mean]:
  """What every trace tells, for training and evaluation alike.

  nll: nats per target with thoughts, mean over samples. accuracy: the target is the most likely token. nll_base: the
  same targets without thoughts, where known. think_length, think_entropy: per thought. thoughts: per row, and
  thoughts_dropped those that found no room in it (there only if a row can have more thoughts than thought.room).
  mix_weight: of the prediction after a thought; mix_weight_0of5 ... 4of5: its histogram, the share in each fifth of
  [0, 1], the outer ones with what is beyond (mixing logit).
  effective_samples: of a group, 1 / sum_g w_g^2 with w = softmax_g log p(y | x, z_g), the weights of bound M.
  brier_report: the Brier score of what thoughts report, where they do. answer_match: of sampled answers, those that
  begin what came, see `rewards.prefix_match`.
  residual: of parallel iterations, how much of its norm a thought would still change in one more; 0 is exact.
  """
  trace = jax.lax.stop_gradient(trace)
  valid_BGN = jnp.broadcast_to(trace.valid_BN[:, None], trace.used_BGN.shape)
  found = dict(
    nll=Mean.of(-trace.logp_BGT.mean(axis=1), trace.weights_BT),
    accuracy=Mean.of(trace.hit_BGT.mean(axis=1), trace.weights_BT),
  )
  if trace.base_logp_BT is not None:
    found["nll_base"] = Mean.of(-trace.base_logp_BT, trace.weights_BT)
  if trace.report is not None:
    found["brier_report"] = Mean.of(score("brier", trace.report), trace.report.weight_BN[:, None])
  if trace.answer is not None:
    found["answer_match"] = Mean.of(prefix_match(trace), (trace.answer.weight_BN > 0)[:, None])
  if trace.valid_BN.shape[1]:
    rows = jnp.asarray(trace.valid_BN.shape[0], jnp.float32)
    found |= dict(
      think_length=Mean.of(trace.used_BGN, valid_BGN),
      think_entropy=Mean.of(trace.entropy_BGN, valid_BGN),
      thoughts=Mean(trace.valid_BN.sum().astype(jnp.float32), rows),
    )
    if valid_BGN.shape[1] > 1:
      weight_BGN = jax.nn.softmax(trace.outcome_BGN, axis=1)
      found["effective_samples"] = Mean.of(1 / jnp.sum(weight_BGN**2, axis=1), trace.valid_BN)
  if trace.mix_BGN is not None:
    found["mix_weight"] = Mean.of(trace.mix_BGN, valid_BGN)
    for low in range(MIX_BINS):
      inside_BGN = jnp.clip(jnp.floor(trace.mix_BGN * MIX_BINS), 0, MIX_BINS - 1) == low
      found[f"mix_weight_{low}of{MIX_BINS}"] = Mean.of(inside_BGN, valid_BGN)
  if trace.residual_BGN is not None:
    found["residual"] = Mean.of(trace.residual_BGN, valid_BGN)
  if trace.dropped_B is not None:
    found["thoughts_dropped"] = Mean.of(trace.dropped_B, jnp.ones(trace.dropped_B.shape))
  return found


def volume(trace: Trace, batch: Batch, vocabulary: Vocabulary) -> dict[str, Mean]:
  """How much was processed: bits per byte of the targets, and counts of real and think tokens (totals)."""
  logp_BT = jax.lax.stop_gradient(trace.logp_BGT).mean(axis=1)
  bytes_BT = jnp.asarray(vocabulary.bytes_V.astype(np.int32))[batch.targets_BT]
  weights_BT = trace.weights_BT
  bits = jnp.sum(-logp_BT * weights_BT) / np.log(2)
  one = jnp.ones(())  # `step.TOKENS`: totals, however many parts are added up
  return dict(
    bits_per_byte=Mean(bits, jnp.sum(bytes_BT * weights_BT)),
    real_tokens=Mean(jnp.sum(batch.segments_BT > 0).astype(jnp.float32), one),
    think_tokens=Mean(jnp.sum(trace.used_BGN).astype(jnp.float32), one),
  )
