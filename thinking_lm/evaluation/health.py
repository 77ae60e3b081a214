"""A look at the thoughts of a model in training, every so many steps: what one step's numbers cannot tell.

effect_none, effect_shuffled, effect_pause: nats per target that it costs to leave the thoughts out, to put another
sequence's in their place, or pauses: where the first is a gain and another is none, it is not the content of the
thoughts that gains. think_length_p95: think tokens that 95 % of the thoughts need no more than, for thoughts that can
end by themselves (metrics of training are sums over rows, which a percentile is not). sampler_mismatch,
sampler_mismatch_mean: largest and mean absolute difference between the log-probabilities of a drawn think token as
training draws it, one slot after the other, and as a parallel pass over the tokens scores it, in nats; a private
thought is trained on the former (`model/replay.py`), a persistent one on the latter. nll_grad_norm, score_grad_norm:
norms of the two terms' gradients, as weighted, the former with that of the targets without thoughts; where one of them
has no weight there is nothing to compare. chain_grad_first, chain_grad_last: norms of the gradient, in nats per target,
that reaches the first and the last think token of thoughts whose tokens are made one from another; of one-token
thoughts that stay in the context, of the first and the last in a row. thought_rank: effective dimensions of the last
think inputs, (sum of variances)^2 / sum of squared covariances.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from thinking_lm.errors import ConfigError
from thinking_lm.evaluation.controls import Source, counted, pause, shuffled
from thinking_lm.evaluation.evaluators import Subject
from thinking_lm.objectives.bounds import BOUNDS
from thinking_lm.types import Batch, Carried, Params, Trace

ROUNDING = 1e-10
"""Variance of vectors, as a share of their squared mean, up to which they are the same: float32 has steps of 1e-7."""


class Examination:
  """The hook. It looks at the first batch of a split, with the same random key every time, and changes nothing.

  Args:
    terms: name of a norm -> the loss function of that term alone; see `training.step.LossFn`.
    put: this process' rows of a batch -> the global batch on the devices.
  """

  def __init__(
    self,
    every: int,
    split: str,
    size: int,
    subject: Subject,
    key: jax.Array,
    put: Callable[[Batch], Batch],
    terms: Mapping[str, Callable],
  ):
    if not subject.data.rows(split):
      raise ConfigError(f"evaluation.split={split} has no rows to examine; name another one, or health.every=0")
    self.every = every
    self._split, self._size, self._subject, self._key, self._put = split, size, subject, key, put
    self._thought = dataclasses.replace(subject.config.thought, samples=1)
    self._look = jax.jit(self._effects)
    self._terms = {name: jax.jit(jax.grad(term, has_aux=True)) for name, term in terms.items()}
    self._batch: Batch | None = None

  def __call__(self, step: int, state: Any) -> Mapping[str, float]:
    """Numbers of the state's parameters."""
    del step
    batch = self._rows()
    found = self._look(state.params, batch)
    carried = Carried(step=state.step, extra=state.extra)
    for name, gradient in self._terms.items():
      grads, metrics = gradient(state.params, batch, self._key, carried)
      found[name] = optax.tree.norm(grads) / jnp.maximum(metrics["loss"].count, 1)
    return {name: float(value) for name, value in jax.device_get(found).items()}

  def _rows(self) -> Batch:
    if self._batch is None:
      batches = self._subject.data.evaluation_batches(
        self._split,
        batch_size=self._size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        limit=self._size,
      )
      self._batch = self._put(next(iter(batches)))
    return self._batch

  def _effects(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
    roll, thought = self._subject.rollout, self._thought
    own = roll(params, batch, self._key, thought=thought)
    every_BT = batch.weights_BT
    without = roll(params, batch, self._key, thought=dataclasses.replace(thought, length=0))
    found = dict(effect_none=_nats(without, every_BT) - _nats(own, every_BT))
    if thought.may_end:
      found["think_length_p95"] = percentile(own.used_BGN[:, 0], own.valid_BN, 0.95)
    if thought.kind == "pause":
      return found
    found |= self._chain(params, batch, own) | self._replaced(params, batch, own)
    used_BN = own.used_BGN[:, 0]
    last_BN11 = jnp.maximum(used_BN - 1, 0)[..., None, None]
    last_BND = jnp.take_along_axis(own.thoughts.inputs_BGNJD[:, 0], last_BN11, axis=2)[:, :, 0]
    found["thought_rank"] = effective_rank(last_BND, own.valid_BN & (used_BN > 0))
    if thought.kind_of.policy:
      found |= self._mismatch(params, batch, own)
    return found

  def _replaced(self, params: Params, batch: Batch, own: Trace) -> dict[str, jax.Array]:
    """What other thoughts in place of `own` cost, side by side as two samples of one pass."""
    thought, source = self._thought, self._source(params, own)
    (other, changed_BN), (empty, _) = shuffled(source), pause(source)
    given = jax.tree.map(lambda *a: jnp.concatenate(a, axis=1), other, empty)
    two = dataclasses.replace(thought, samples=2)
    trace = self._subject.rollout(params, batch, self._key, given=given, thought=two)
    layout, every_BT = self._subject.place(params, batch, thought), batch.weights_BT
    kept_BT = counted(batch, layout, changed_BN, thought.topology) * every_BT
    cost = lambda sample, weights_BT: _nats(trace, weights_BT, sample) - _nats(own, weights_BT)
    return dict(effect_shuffled=cost(0, kept_BT), effect_pause=cost(1, every_BT))

  def _mismatch(self, params: Params, batch: Batch, own: Trace) -> dict[str, jax.Array]:
    """How far log pi of the tokens of `own` as they are drawn is from what scoring them gives."""
    thought, drawn = self._thought, own
    if thought.topology == "persistent" and thought.rescore:  # `own` has the scores already: draw with them
      drawn = self._subject.rollout(params, batch, self._key, thought=dataclasses.replace(thought, rescore=False))
    scored = self._subject.rollout(params, batch, self._key, given=drawn.thoughts, thought=thought)
    apart_BGNJ = jnp.abs(drawn.token_logp_BGNJ - scored.token_logp_BGNJ)  # 0 at tokens that nobody chose
    mean = jnp.sum(apart_BGNJ) / jnp.maximum(jnp.sum(drawn.chosen_BGNJ), 1)
    return dict(sampler_mismatch=jnp.max(apart_BGNJ, initial=0.0), sampler_mismatch_mean=mean)

  def _chain(self, params: Params, batch: Batch, own: Trace) -> dict[str, jax.Array]:
    """Norms at both ends of the chain of think tokens; nothing where there is none."""
    thought, shape = self._thought, own.thoughts.inputs_BGNJD.shape
    within = thought.length > 1
    if not thought.chained or not (within or (thought.topology == "persistent" and shape[2] > 1)):
      return {}

    def loss(taps_BGNnD):
      return -BOUNDS["J"].value(self._subject.rollout(params, batch, self._key, thought=thought, taps=taps_BGNnD))

    grads_BNnD = jax.grad(loss)(jnp.zeros(shape))[:, 0] / jnp.maximum(batch.weights_BT.sum(), 1)
    if within:
      first, last = grads_BNnD[:, :, 0], grads_BNnD[:, :, -1]
    else:
      at_B = jnp.maximum(own.valid_BN.sum(axis=1) - 1, 0)  # valid anchors come first
      first, last = grads_BNnD[:, 0], jnp.take_along_axis(grads_BNnD, at_B[:, None, None, None], axis=1)
    return dict(chain_grad_first=optax.tree.norm(first), chain_grad_last=optax.tree.norm(last))

  def _source(self, params: Params, trace: Trace) -> Source:
    """Thoughts to be shuffled within the batch alone: nothing comes before it."""
    decoder = self._subject.model.bind(params)
    nobody = jax.tree.map(lambda a: jnp.zeros((1, *a.shape[1:]), a.dtype), trace.thoughts)
    no_row_N = jnp.zeros(trace.valid_BN.shape[1], bool)
    return Source(trace.thoughts, trace.valid_BN, decoder.embed_row(decoder.pause), nobody, no_row_N)


def _nats(trace: Trace, weights_BT, sample: int = 0) -> jax.Array:
  """Per target, of one of the samples."""
  return -jnp.sum(trace.logp_BGT[:, sample] * weights_BT) / jnp.maximum(weights_BT.sum(), 1)


def percentile(values_BN, valid_BN, share: float) -> jax.Array:
  """The smallest of the valid values that so large a share of them does not exceed; 0 if there are none."""
  ordered_X = jnp.sort(jnp.where(valid_BN, values_BN, jnp.inf), axis=None)
  count = valid_BN.sum()
  at = jnp.maximum(jnp.ceil(share * count).astype(jnp.int32) - 1, 0)
  return jnp.where(count > 0, ordered_X[at], 0.0)


def effective_rank(inputs_BND, valid_BN) -> jax.Array:
  """(sum of variances)^2 / (sum of squared covariances) of the valid vectors: 1 on a line, D when all directions are
  alike (participation ratio); 0 for vectors that are the same, up to rounding.
  """
  weights_BN = valid_BN.astype(jnp.float32)
  count = jnp.maximum(weights_BN.sum(), 1)
  mean_D = jnp.einsum("bn,bnd->d", weights_BN, inputs_BND) / count
  centred_BND = (inputs_BND - mean_D) * weights_BN[..., None]
  covariance_DD = jnp.einsum("bnd,bne->de", centred_BND, centred_BND, precision="highest") / count
  spread = jnp.trace(covariance_DD)
  ratio = spread**2 / jnp.maximum(jnp.sum(covariance_DD**2), 1e-30)
  return jnp.where(spread > ROUNDING * jnp.sum(mean_D**2), ratio, 0.0)
