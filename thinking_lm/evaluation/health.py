"""A look at the thoughts of a model in training, every so many steps: what one step's numbers cannot tell.

effect_none, effect_shuffled: nats per target that it costs to leave the thoughts out, or to put another sequence's in
their place: 0 or less, and the content of the thoughts does nothing. sampler_mismatch, sampler_mismatch_mean: largest
and mean absolute difference between the log-probabilities of a drawn think token as training draws it, one slot after
the other, and as a parallel pass over the tokens scores it, in nats. A private thought is trained on the former
(`model/replay.py`), a persistent one on the latter.
nll_grad_norm, score_grad_norm: norms of the two terms' gradients, as weighted. chain_grad_first, chain_grad_last: norms
of the gradient, in nats per target, that reaches the first and the last think token of thoughts whose tokens are made
one from another; of one-token thoughts that stay in the context, of the first and the last in a row. thought_rank:
effective dimensions of the last think inputs, (sum of variances)^2 / sum of squared covariances.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from thinking_lm.errors import ConfigError
from thinking_lm.evaluation.controls import Source, counted, shuffled
from thinking_lm.evaluation.evaluators import Subject
from thinking_lm.objectives.bounds import BOUNDS
from thinking_lm.types import Batch, Carried, Params, Trace


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
    nats = lambda trace, weights_BT: -jnp.sum(trace.logp_BGT[:, 0] * weights_BT) / jnp.maximum(weights_BT.sum(), 1)
    without = roll(params, batch, self._key, thought=dataclasses.replace(thought, length=0))
    found = dict(effect_none=nats(without, every_BT) - nats(own, every_BT))
    if thought.kind == "pause":
      return found
    found |= self._chain(params, batch, own)
    other, changed_BN = shuffled(self._source(own))
    kept_BT = counted(batch, self._subject.place(params, batch, thought), changed_BN, thought.topology) * every_BT
    replaced = roll(params, batch, self._key, given=other, thought=thought)
    found["effect_shuffled"] = nats(replaced, kept_BT) - nats(own, kept_BT)
    found["thought_rank"] = effective_rank(own.thoughts.inputs_BGNJD[:, 0, :, -1], own.valid_BN)
    if thought.kind_of.policy:
      found |= self._mismatch(params, batch, own)
    return found

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

  def _source(self, trace) -> Source:
    """Thoughts to be shuffled within the batch alone: nothing comes before it."""
    nobody = jax.tree.map(lambda a: jnp.zeros((1, *a.shape[1:]), a.dtype), trace.thoughts)
    no_pause_D = jnp.zeros(trace.thoughts.inputs_BGNJD.shape[-1])
    return Source(trace.thoughts, trace.valid_BN, no_pause_D, nobody, jnp.zeros(trace.valid_BN.shape[1], bool))


def effective_rank(inputs_BND, valid_BN) -> jax.Array:
  """(sum of variances)^2 / (sum of squared covariances) of the valid vectors: 1 on a line, D when all directions are
  alike (participation ratio); 0 for fewer than two different vectors.
  """
  weights_BN = valid_BN.astype(jnp.float32)
  count = jnp.maximum(weights_BN.sum(), 1)
  mean_D = jnp.einsum("bn,bnd->d", weights_BN, inputs_BND) / count
  centred_BND = (inputs_BND - mean_D) * weights_BN[..., None]
  covariance_DD = jnp.einsum("bnd,bne->de", centred_BND, centred_BND, precision="highest") / count
  return jnp.trace(covariance_DD) ** 2 / jnp.maximum(jnp.sum(covariance_DD**2), 1e-30)
