"""A discrete bottleneck: one of 16 symbols must pass through one discrete thought of 16 to its reconstruction.

tables: a policy and a reader that are a table each. transformer: a small decoder and its real rollout. It is shown the
symbol in the row where it thinks; in the row where the thought is read, the same symbol stands before it in every case.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from thinking_lm.analysis.estimators import ESTIMATORS, goal
from thinking_lm.analysis.microscope_report import aligned, number
from thinking_lm.analysis.tables import straight_through, trace
from thinking_lm.model.decoder import Model, ModelConfig
from thinking_lm.model.enumeration import rollout_every
from thinking_lm.model.rollout import actions, rollout
from thinking_lm.objectives.exact import marginal
from thinking_lm.objectives.objective import ObjectiveConfig, objective
from thinking_lm.thoughts import relaxed
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Batch, Layout, Thoughts, Trace

SYMBOLS, STEPS, SEEDS = 16, 1500, 5
INITIAL = 0.3
"""Standard deviation of the tables before training."""

PUBLISHED = dict(
  exact_M=0.91,
  exact_J=0.91,
  gumbel=0.93,
  hybrid=0.86,
  vimco=0.83,
  quiet_star=0.80,
  grpo=0.77,
  rlp=0.07,
  nll_only=0.06,
)
"""Mean p(x) of the design notes, on tables; chance is 0.0625."""

Loss = Callable[[Any, jax.Array], jax.Array]


class Thinker(NamedTuple):
  """init: key -> parameters. loss: (line of the table, G) -> (parameters, key) -> loss of all symbols, each with G
  thoughts. right: parameters -> mean over symbols of sum_z pi(z | x) p(x | z). rate: Adam's. names: its lines.
  """

  init: Callable[[jax.Array], Any]
  loss: Callable[[str, int], Loss]
  right: Callable[[Any], jax.Array]
  rate: float
  names: tuple[str, ...]


def _table_init(key):
  shape, keys = (SYMBOLS, SYMBOLS), jax.random.split(key)
  return {name: INITIAL * jax.random.normal(k, shape) for name, k in zip(("policy_XZ", "reader_ZX"), keys, strict=True)}


def _table_right(params):
  policy_XZ, reader_ZX = jax.nn.softmax(params["policy_XZ"]), jax.nn.softmax(params["reader_ZX"])
  return jnp.einsum("xz,zx->x", policy_XZ, reader_ZX).mean()


def _relaxed_outcome(params, policy_XX, token_XG, key):
  """log p(x | relaxed copy of the thought), differentiable in the policy only."""
  shape = (*token_XG.shape, SYMBOLS)
  noise = relaxed.noise(jax.random.split(key, token_XG.shape), SYMBOLS)
  z = relaxed.coupled(jnp.broadcast_to(policy_XX[:, None], shape), token_XG, noise)
  weights = relaxed.weights(z, ESTIMATORS["rebar"]["thought.relaxation"])
  logits_XGY = weights @ jax.lax.stop_gradient(params["reader_ZX"])
  return jax.nn.log_softmax(logits_XGY)[jnp.arange(SYMBOLS), :, jnp.arange(SYMBOLS)]


def _table_loss(name: str, G: int) -> Loss:
  def loss(params, key):
    policy_XZ = jax.nn.log_softmax(params["policy_XZ"])
    outcome_ZX = jax.nn.log_softmax(params["reader_ZX"])
    if name == "gumbel":
      hot_XGZ = straight_through(jnp.broadcast_to(policy_XZ[:, None], (SYMBOLS, G, SYMBOLS)), key)
      logp_XGY = jax.nn.log_softmax(hot_XGZ @ params["reader_ZX"])
      return -logp_XGY[jnp.arange(SYMBOLS), :, jnp.arange(SYMBOLS)].mean(axis=1).sum()
    if name.startswith("exact"):
      every = trace(policy_XZ, outcome_ZX.T, jnp.broadcast_to(jnp.arange(SYMBOLS), (SYMBOLS, SYMBOLS)))
      return objective(ObjectiveConfig(exact=True, bound=name[-1]), marginal(every))[0]
    keys = jax.random.split(key)
    z_XG = jax.random.categorical(keys[0], policy_XZ[:, None], shape=(SYMBOLS, G))
    copies = _relaxed_outcome(params, policy_XZ, z_XG, keys[1]) if name == "rebar" else None
    logs = jnp.take_along_axis(policy_XZ, z_XG, axis=1), jnp.take_along_axis(outcome_ZX.T, z_XG, axis=1)
    return objective(goal(name), trace(*logs, z_XG, copies))[0]

  return loss


MODEL = Model(ModelConfig(layers=1, width=32, heads=2, mlp_width=64, tie_embeddings=False), SYMBOLS)
THOUGHT = ThoughtConfig(kind="sampled", length=1, topology="private", lookahead=1)
LAYOUT = Layout(anchors_BN=np.zeros((SYMBOLS, 1), np.int32), block=1, blocks=1)


def _rows(tokens_X) -> Batch:
  """A row of one token for each symbol, which is its target."""
  one = np.ones((SYMBOLS, 1), np.int32)
  return Batch(
    tokens_BT=tokens_X[:, None],
    targets_BT=np.arange(SYMBOLS, dtype=np.int32)[:, None],
    weights_BT=one.astype(np.float32),
    segments_BT=one,
    positions_BT=0 * one,
    ids_B=np.arange(SYMBOLS, dtype=np.uint32),
  )


SHOWN, HIDDEN = _rows(np.arange(SYMBOLS, dtype=np.int32)), _rows(np.zeros(SYMBOLS, np.int32))
"""The rows that are thought about, and those that a thought is read in."""


def _joined(policy: Trace, reader: Trace) -> Trace:
  """The trace of thoughts that were drawn in some rows and read in others."""
  names = ("policy_logp_BGN", "entropy_BGN", "token_logp_BGNJ")
  return reader.replace(**{name: getattr(policy, name) for name in names})


def _every_thought(params) -> Trace:
  key = jax.random.key(0)  # nothing is drawn
  return _joined(*(rollout_every(MODEL, THOUGHT, params, rows, LAYOUT, key) for rows in (SHOWN, HIDDEN)))


def _straight_through(params, thought: ThoughtConfig, key) -> Thoughts:
  """Thoughts as the rollout makes them, but with their gradient, which no Trace keeps."""
  decoder = MODEL.bind(params)
  mask = jnp.ones((1, 1, 1), bool)
  hidden_X1D = decoder(decoder.embed(SHOWN.tokens_BT)[:, None], SHOWN.positions_BT[:, None], mask)[0][:, 0]
  shape = (SYMBOLS, thought.samples, 1, 1, hidden_X1D.shape[-1])
  keys = jax.random.split(key, shape[:-1])
  return Thoughts(*thought.kind_of.step(decoder, jnp.broadcast_to(hidden_X1D[:, None, None], shape), keys, thought))


def _decoder_loss(name: str, G: int) -> Loss:
  thought = dataclasses.replace(THOUGHT, samples=G)

  def loss(params, key):
    read = functools.partial(rollout, MODEL, thought, params, HIDDEN, LAYOUT, key)
    if name.startswith("exact"):
      return objective(ObjectiveConfig(exact=True, bound=name[-1]), marginal(_every_thought(params)))[0]
    if name == "gumbel":
      return objective(goal(name), read(_straight_through(params, dataclasses.replace(thought, kind="gumbel"), key)))[0]
    drawn = rollout(MODEL, thought, params, SHOWN, LAYOUT, key)
    return objective(goal(name), _joined(drawn, read(actions(MODEL.bind(params), thought, drawn.thoughts))))[0]

  return loss


def _decoder_right(params):
  every = _every_thought(params)
  return jnp.exp(every.policy_logp_BGN + every.outcome_BGN).sum(axis=1).mean()


NAMES = (*PUBLISHED, "jepo", "reinforce")
THINKERS = dict(
  tables=Thinker(_table_init, _table_loss, _table_right, rate=0.03, names=(*NAMES, "rebar")),
  transformer=Thinker(MODEL.init, _decoder_loss, _decoder_right, rate=0.003, names=NAMES),
)
"""The transformer has no line rebar: a rollout reads relaxed copies where they were drawn, which tells the symbol."""


def train(thinker: Thinker, name: str, seeds: int = SEEDS, steps: int = STEPS, G: int = 4) -> np.ndarray:
  """Mean p(x) after training, of each seed."""
  loss, optimizer = thinker.loss(name, G), optax.adam(thinker.rate)

  def run(key):
    first, draws = jax.random.split(key)
    params = thinker.init(first)

    def step(state, key):
      params, memory = state
      updates, memory = optimizer.update(jax.grad(loss)(params, key), memory)
      return (optax.apply_updates(params, updates), memory), None

    params, _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(draws, steps))[0]
    return thinker.right(params)

  return np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), seeds)))


def report(thinker: Thinker) -> str:
  """The table of what is learned through a discrete bottleneck."""
  rows = [["mean p(x)", "ours", "each seed", "design notes"]]
  for name in thinker.names:
    p_S = train(thinker, name)
    rows.append([name, f"{p_S.mean():.2f}", " ".join(f"{p:.2f}" for p in p_S), number(PUBLISHED.get(name), 2)])
  return aligned(rows)
