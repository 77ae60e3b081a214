"""Gradients of what is expected over rows that enumerate thoughts, by one program that pulls back the rollout."""

import jax
import jax.numpy as jnp
import numpy as np


def flat(tree):
  """Its leaves as one vector, float64."""
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


def reversible(run, params):
  """(traced: params -> trace, pull: cotangents -> the gradient at `params`, flat) of run: params -> (fields, trace).

  fields: the arrays of the trace that are differentiated, by their names. Both are one compiled program.
  """

  @jax.jit
  def both(params, cotangents):
    _, pull, trace = jax.vjp(run, params, has_aux=True)
    return trace, pull(cotangents)[0]

  nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run, params)[0])
  return lambda other: both(other, nothing)[0], lambda cotangents: flat(both(params, cotangents)[1])


def through(trace, pull, names, of):
  """The gradient of a function of the trace, through the fields of these names."""
  fields = {name: getattr(trace, name) for name in names}
  return pull(jax.grad(lambda fields: of(trace.replace(**fields)))(fields))


def probability(trace):
  """Of each row's thoughts, and of their answers, [B]."""
  return jnp.exp(trace.policy_logp_BGN.sum(axis=(1, 2)))
