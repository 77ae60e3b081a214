"""The one objective: a choice of bound, reward, advantage, and the weights of the two terms of its gradient.

    grad J = E_z[ (log p(y|x,z) - b) grad log pi(z|x)  +  grad log p(y|x,z) ]
             score term, "RL" (score_weight)              pathwise term, "real gradient" (nll_weight)

The value that is returned is a sum over the real targets; whoever takes the gradient divides by the number of targets
of the whole global batch, so that micro-batches and devices add up.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from thinking_lm.config import option
from thinking_lm.metrics import Mean
from thinking_lm.objectives.advantages import ADVANTAGES
from thinking_lm.objectives.bounds import BOUNDS
from thinking_lm.objectives.rewards import REWARDS
from thinking_lm.types import Batch, Trace, Vocabulary


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """The objective. Real gradients only: nll_weight 1, score_weight 0. Policy gradient only: the reverse."""

  nll_weight: float = option(1.0, "of -log p(target) with thoughts, differentiated through them where they allow it")
  score_weight: float = option(0.0, "of the policy-gradient term; needs kind sampled", low=0)
  base_weight: float = option(0.0, "of -log p(target) without thoughts; needs topology private", low=0)
  bound: str = option("J", "which expectation over thoughts the NLL term maximises", choices=BOUNDS)
  reward: str = option("log_prob", "what the score term pays a thought for", choices=REWARDS)
  advantage: str = option("leave_one_out", "how the score term centres rewards", choices=ADVANTAGES)

  def faults(self) -> list[str]:
    """Rules across fields."""
    if self.nll_weight <= 0 and not self.score_weight and not self.base_weight:
      return ["nll_weight, score_weight and base_weight are all 0: there is nothing to learn"]
    return ["nll_weight must not be negative"] if self.nll_weight < 0 else []


def objective(config: ObjectiveConfig, trace: Trace) -> tuple[jax.Array, dict[str, Mean]]:
  """(loss summed over targets, metrics). `metrics["loss"]` holds that sum and the number of targets."""
  weights_BT = trace.weights_BT
  bound = BOUNDS[config.bound]
  count = weights_BT.sum()
  nll = -jnp.sum(bound(trace.logp_BGT) * weights_BT)
  if trace.ahead_logp_BGNA is not None:
    nll -= jnp.sum(bound(trace.ahead_logp_BGNA) * trace.ahead_weights_BNA)
    count += trace.ahead_weights_BNA.sum()
  loss = config.nll_weight * nll
  metrics = describe(trace)
  if config.base_weight:
    loss -= config.base_weight * jnp.sum(trace.base_logp_BT * weights_BT)
  if config.score_weight:
    reward_BGN = jax.lax.stop_gradient(REWARDS[config.reward](trace.outcome_BGN))
    advantage_BGN = ADVANTAGES[config.advantage].of(reward_BGN)
    score = -jnp.sum(advantage_BGN * trace.policy_logp_BGN * trace.valid_BN[:, None]) / reward_BGN.shape[1]
    loss += config.score_weight * score
    valid_BGN = jnp.broadcast_to(trace.valid_BN[:, None], reward_BGN.shape)
    metrics |= dict(
      reward=Mean.of(reward_BGN, valid_BGN),
      reward_std=Mean.of(reward_BGN.std(axis=1), trace.valid_BN),
      advantage_abs=Mean.of(jnp.abs(advantage_BGN), valid_BGN),
    )
  return loss, metrics | dict(loss=Mean(loss, count))


def describe(trace: Trace) -> dict[str, Mean]:
  """What every trace tells, for training and evaluation alike.

  nll: nats per target with thoughts, mean over samples. accuracy: the target is the most likely token. nll_base: the
  same targets without thoughts, where known. think_length, think_entropy: per thought. thoughts: per row.
  """
  trace = jax.lax.stop_gradient(trace)
  valid_BGN = jnp.broadcast_to(trace.valid_BN[:, None], trace.used_BGN.shape)
  found = dict(
    nll=Mean.of(-trace.logp_BGT.mean(axis=1), trace.weights_BT),
    accuracy=Mean.of(trace.hit_BGT.mean(axis=1), trace.weights_BT),
  )
  if trace.base_logp_BT is not None:
    found["nll_base"] = Mean.of(-trace.base_logp_BT, trace.weights_BT)
  if trace.valid_BN.shape[1]:
    rows = jnp.asarray(trace.valid_BN.shape[0], jnp.float32)
    found |= dict(
      think_length=Mean.of(trace.used_BGN, valid_BGN),
      think_entropy=Mean.of(trace.entropy_BGN, valid_BGN),
      thoughts=Mean(trace.valid_BN.sum().astype(jnp.float32), rows),
    )
  return found


def volume(trace: Trace, batch: Batch, vocabulary: Vocabulary) -> dict[str, Mean]:
  """How much was processed: bits per byte of the targets, and counts of real and think tokens (totals)."""
  logp_BT = jax.lax.stop_gradient(trace.logp_BGT).mean(axis=1)
  bytes_BT = jnp.asarray(vocabulary.bytes_V.astype(np.int32))[batch.targets_BT]
  weights_BT = trace.weights_BT
  bits = jnp.sum(-logp_BT * weights_BT) / np.log(2)
  one = jnp.ones(())
  return dict(
    bits_per_byte=Mean(bits, jnp.sum(bytes_BT * weights_BT)),
    real_tokens=Mean(jnp.sum(batch.segments_BT > 0).astype(jnp.float32), one),
    think_tokens=Mean(jnp.sum(trace.used_BGN).astype(jnp.float32), one),
  )
