"""A look at the thoughts of a model in training, every so many steps: what one step's numbers cannot tell.

effect_none, effect_shuffled, effect_pause: nats per target that it costs to leave the thoughts out, to put another
sequence's in their place, or pauses: where the first is a gain and another is none, it is not the content of the
thoughts that gains. think_length_p95: think tokens that 95 % of the thoughts need no more than, for thoughts that can
end by themselves (metrics of training are sums over rows, which a percentile is not). sampler_mismatch,
sampler_mismatch_mean: largest and mean absolute difference between the log-probabilities of a drawn think token as
training draws it, one slot after the other, and as a parallel pass over the tokens scores it, in nats; a private
thought is trained on the former (`model/replay.py`), a persistent one on the latter. sampler_ratio: the mean over these
tokens of the latter probability over the former, which is 1 in expectation. think_entropy_lowest: mean surprisal, -log
pi of what was drawn, of the think token for which it is lowest, the first, the second, ...: an estimate of its entropy.
nll_grad_norm, score_grad_norm: norms of the two terms' gradients, as weighted, in nats per target, the former with that
of the targets without thoughts, if both have a weight. nll_grad_snr, score_grad_snr: signal to noise of these, squared
norm of the expected gradient over the variance of this batch's, from its even and its odd rows, which disagree by noise
alone; an estimate, which may be below 0. kl_start_k1, kl_start_k3: KL(policy of the run's first parameters || policy),
nats a thought, by thoughts that the former draws, as two estimates: the mean of log pi_start - log pi, and Schulman's
k3, which is never negative. chain_grad_first, chain_grad_last: norms of the gradient, in nats per target,
that reaches the first and the last think token of thoughts whose tokens are made one from another; of one-token
thoughts that stay in the context, of the first and the last in a row. thought_rank: effective dimensions of the last
think inputs, (sum of variances)^2 / sum of squared covariances.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from thinking_lm.errors import ConfigError
from thinking_lm.evaluation.controls import Source, counted, pause, shuffled
from thinking_lm.evaluation.evaluators import Subject
from thinking_lm.evaluation.hook import Feed
from thinking_lm.model.rollout import actions
from thinking_lm.objectives.bounds import BOUNDS
from thinking_lm.objectives.policy import approximate_kl
from thinking_lm.sharding import constrain_each, each_copy
from thinking_lm.types import Batch, Carried, Params, Thoughts, Trace

ROUNDING = 1e-10
"""Variance of vectors, as a share of their squared mean, up to which they are the same: float32 has steps of 1e-7."""


class Examination:
  """The hook. It looks at the first batch of a split, with the same random key every time, and changes nothing.

  Args:
    terms: nll, score -> the loss function of that term alone; see `training.step.LossFn`.
    size: rows. feed: as `training.mesh.feed`, on the devices of a mesh.
    first: parameters, for their shardings -> those that the run started with, None if they are gone; called once, and
      not kept: a run that is started again makes them again.
  """

  def __init__(
    self,
    every: int,
    split: str,
    size: int,
    subject: Subject,
    key: jax.Array,
    feed: Feed,
    terms: Mapping[str, Callable],
    first: Callable[[Params], Params | None] | None = None,
  ):
    if not subject.data.rows(split):
      raise ConfigError(f"evaluation.split={split} has no rows to examine; name another one, or health.every=0")
    self.every = every
    self._split, self._size, self._subject, self._key, self._feed = split, size, subject, key, feed
    self._thought = dataclasses.replace(subject.config.thought, samples=1)
    self._look = jax.jit(self._effects)
    self._terms = {name: jax.jit(of_half(term, subject.model.axes)) for name, term in terms.items()}
    self._batch: Batch | None = None
    self._first = first if self._thought.kind_of.policy else None
    self._drawn: tuple[Thoughts, jax.Array, jax.Array] | None = None
    self._draw, self._move = jax.jit(self._start), jax.jit(self._moved)

  def __call__(self, step: int, state: Any) -> Mapping[str, float]:
    """Numbers of the state's parameters."""
    del step
    batch = self._rows()
    found = self._look(state.params, batch)
    make, self._first = self._first, None
    if make is not None and (first := make(state.params)) is not None:
      self._drawn = self._draw(first, batch)
    if self._drawn is not None:
      found |= self._move(state.params, batch, self._drawn)
    carried = Carried(step=state.step, extra=state.extra)
    for name, gradient in self._terms.items():
      halves = [gradient(state.params, batch, self._key, carried, half) for half in (0, 1)]
      found |= {f"{name}_grad_{what}": number for what, number in jax.jit(norm_and_snr)(*halves).items()}
    return {name: float(value) for name, value in jax.device_get(found).items()}

  def _rows(self) -> Batch:
    if self._batch is None:
      read = self._subject.data.evaluation_batches
      read = functools.partial(read, self._split, batch_size=self._size, limit=self._size)
      self._batch = next(self._feed(self._size, read))
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

  def _start(self, params: Params, batch: Batch) -> tuple[Thoughts, jax.Array, jax.Array]:
    """What the first policy draws: thoughts, log pi of their tokens, which of these it chose."""
    own = self._subject.rollout(params, batch, self._key, thought=self._thought)
    return own.thoughts, own.token_logp_BGNJ, own.chosen_BGNJ

  def _moved(self, params: Params, batch: Batch, drawn) -> dict[str, jax.Array]:
    """How far the policy is from the one that drew."""
    thoughts, before_BGNJ, chosen_BGNJ = drawn
    given = actions(self._subject.model.bind(params), self._thought, thoughts)
    trace = self._subject.rollout(params, batch, self._key, given=given, thought=self._thought)
    delta_BGNJ = trace.token_logp_BGNJ - before_BGNJ
    count = jnp.maximum(trace.valid_BN.sum(), 1)
    mean = lambda a_BGNJ: jnp.sum(jnp.where(chosen_BGNJ, a_BGNJ, 0)) / count
    return dict(kl_start_k1=mean(-delta_BGNJ), kl_start_k3=mean(approximate_kl(delta_BGNJ)))

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
    above_BGNJ = scored.token_logp_BGNJ - drawn.token_logp_BGNJ  # 0 at tokens that nobody chose
    mean = lambda a_BGNJ: jnp.sum(a_BGNJ * drawn.chosen_BGNJ) / jnp.maximum(jnp.sum(drawn.chosen_BGNJ), 1)
    apart_BGNJ = jnp.abs(above_BGNJ)
    found = dict(sampler_mismatch=jnp.max(apart_BGNJ, initial=0.0), sampler_mismatch_mean=mean(apart_BGNJ))
    if thought.kind_of.discrete:
      times_J = jnp.sum(own.chosen_BGNJ, axis=(0, 1, 2))
      surprisal_J = -jnp.sum(own.token_logp_BGNJ, axis=(0, 1, 2)) / jnp.maximum(times_J, 1)
      found["think_entropy_lowest"] = jnp.min(surprisal_J, initial=jnp.inf, where=times_J > 0)
    return found | dict(sampler_ratio=mean(jnp.exp(above_BGNJ)))

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


def of_half(term: Callable, axes: Any) -> Callable:
  """(params, batch, key, carried, half) -> (gradient, number of targets) of half of the rows, the even or the odd.

  The other rows are padding: a row without targets, but with thoughts, would still pay for these. `axes` are those of
  the parameters: the gradient is split like these, and added up as a training step does it.
  """

  def part(rows, common):
    params, key, carried = common
    grads, metrics = jax.grad(term, has_aux=True)(params, rows, key, carried)
    return grads, metrics["loss"].count

  def gradient(params, batch, key, carried, half):
    in_B1 = (jnp.arange(batch.weights_BT.shape[0]) % 2 == half)[:, None]
    kept = dict(weights_BT=jnp.where(in_B1, batch.weights_BT, 0), segments_BT=jnp.where(in_B1, batch.segments_BT, 0))
    grads, count = each_copy(part)(batch.replace(**kept), (params, key, carried))
    return constrain_each(grads, axes), count

  return gradient


def norm_and_snr(even, odd) -> dict[str, jax.Array]:
  """Of the mean gradient of two halves of a batch, each as (its sum, number of targets): norm, signal-to-noise ratio.

  With a and b the means of the halves, <a, b> expects the square of the true gradient, and |a - b|^2 / 4 the variance
  of (a + b) / 2.
  """
  (a, b), counts = zip(even, odd, strict=True)
  norm = optax.tree.norm(optax.tree.add(a, b)) / jnp.maximum(sum(counts), 1)
  a, b = (optax.tree.scale(1 / jnp.maximum(count, 1), each) for each, count in zip((a, b), counts, strict=True))
  noise = optax.tree.norm(optax.tree.sub(a, b), squared=True) / 4
  return dict(norm=norm, snr=optax.tree.vdot(a, b) / jnp.maximum(noise, 1e-30))


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
