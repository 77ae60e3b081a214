"""A thinker of tables whose every group of thoughts can be enumerated: 4 contexts, 6 thoughts, two tokens to predict.

`parameters()["policy_CZ"]` are the logits of pi(z | c), `["reader_CZMY"]` those of each of the two target tokens, and
`["base_CMY"]` those without a thought. Each context is a row with one private thought, that looks two tokens ahead.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from thinking_lm.types import Report, Thoughts, Trace

C, Z, M, Y = 4, 6, 2, 3
TARGETS_CM = np.random.default_rng(0).integers(0, Y, (C, M))


def parameters(seed=1):
  """Float64 tables, spread enough that thoughts differ by several nats."""
  draw = np.random.default_rng(seed).normal
  return dict(policy_CZ=draw(size=(C, Z)), reader_CZMY=2 * draw(size=(C, Z, M, Y)), base_CMY=draw(size=(C, M, Y)))


def groups(G):
  """[C Z^G, 1 + G]: every context with every group of G thoughts."""
  return np.array(list(itertools.product(range(C), *[range(Z)] * G)))


def log_policy(params, rows):
  """log pi of each thought of each group, [B, G]."""
  return jax.nn.log_softmax(params["policy_CZ"])[rows[:, :1], rows[:, 1:]]


def target_logp(params, rows):
  """log p of both targets after each thought of each group, [B, G, M], and whether they are the most likely tokens."""
  c, z = rows[:, :1, None], rows[:, 1:, None]
  m, y = np.arange(M), TARGETS_CM[rows[:, :1]]
  logp_BGMY = jax.nn.log_softmax(params["reader_CZMY"])[c, z, m]
  return jax.nn.log_softmax(params["reader_CZMY"])[c, z, m, y], jnp.argmax(logp_BGMY, axis=-1) == y


def weights(params, rows):
  """Probability of each group, without gradient."""
  return jax.lax.stop_gradient(jnp.exp(log_policy(params, rows).sum(axis=1)))


def trace(params, rows) -> Trace:
  """The trace of a batch whose row b is the context and the thoughts of rows[b]."""
  B, G = len(rows), rows.shape[1] - 1
  logp_BGM, hit_BGM = target_logp(params, rows)
  base_BM = jax.nn.log_softmax(params["base_CMY"])[rows[:, :1], np.arange(M), TARGETS_CM[rows[:, 0]]]
  z_BG = log_policy(params, rows)
  entropy_C = -(jnp.exp(jax.nn.log_softmax(params["policy_CZ"])) * jax.nn.log_softmax(params["policy_CZ"])).sum(axis=1)
  return Trace(
    logp_BGT=logp_BGM[:, :, :1],
    hit_BGT=hit_BGM[:, :, :1],
    weights_BT=jnp.ones((B, 1)),
    base_logp_BT=base_BM[:, :1],
    ahead_logp_BGNA=logp_BGM[:, :, None, 1:],
    ahead_weights_BNA=jnp.ones((B, 1, M - 1)),
    outcome_BGN=logp_BGM.sum(axis=2, keepdims=True),
    policy_logp_BGN=z_BG[:, :, None],
    entropy_BGN=jnp.broadcast_to(entropy_C[rows[:, :1], None], (B, G, 1)),
    valid_BN=jnp.ones((B, 1), bool),
    used_BGN=jnp.asarray(rows[:, 1:, None] % 3 + 1),
    thoughts=Thoughts(jnp.zeros((B, G, 1, 1, 1)), jnp.asarray(rows[:, 1:, None, None])),
    unit_BN=jnp.zeros((B, 1), jnp.int32),
    free_BT=jnp.zeros((B, 1)),
    base_outcome_BN=base_BM.sum(axis=1, keepdims=True),
    outcome_hit_BGN=hit_BGM.all(axis=2)[:, :, None],
    report=report(rows),
  )


def traced(rows) -> Trace:
  """The trace of `parameters()`, made at once."""
  return jax.jit(lambda params: trace(params, rows))(parameters())


def report(rows) -> Report:
  """Thought z names tokens z % 3 and 2 of a vocabulary of 5, at confidences z / 5 and 0.3."""
  z_BG1 = rows[:, 1:, None]
  pair = lambda a, b: jnp.asarray(np.stack([a, np.broadcast_to(b, a.shape)], axis=-1))
  return Report(
    candidates_BGNI=pair(z_BG1 % 3, 2),
    confidences_BGNI=pair(z_BG1 / 5, 0.3),
    actual_BGNI=jnp.full((*z_BG1.shape, 2), 0.2),
    target_BN=jnp.asarray(TARGETS_CM[rows[:, 0], :1]),
    weight_BN=jnp.asarray(0.5 + rows[:, :1]),
    anchors_BN=jnp.zeros((len(rows), 1), int),
    vocabulary=5,
  )


def outcomes(params):
  """log p(y | c, z) of every context and thought, [C, Z]."""
  rows = groups(1)
  return target_logp(params, rows)[0].sum(axis=2).reshape(C, Z)


def exact(params):
  """J, M and P summed over contexts, differentiable."""
  prior_CZ, outcome_CZ = jax.nn.log_softmax(params["policy_CZ"]), outcomes(params)
  return dict(
    J=(jnp.exp(prior_CZ) * outcome_CZ).sum(),
    M=jax.nn.logsumexp(prior_CZ + outcome_CZ, axis=1).sum(),
    P=jnp.exp(prior_CZ + outcome_CZ).sum(),
  )


def sampled_bound(params, G):
  """E L_G, the expected log of the mean probability over G thoughts, summed over contexts, differentiable."""
  rows = groups(G)
  probability_B = jnp.exp(log_policy(params, rows).sum(axis=1))
  logs_BG = target_logp(params, rows)[0].sum(axis=2)
  return (probability_B * jnp.log(jnp.exp(logs_BG).mean(axis=1))).sum()
