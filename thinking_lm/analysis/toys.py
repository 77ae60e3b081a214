"""Two published toys and one of our own, by this project's objectives: how biased, and does it learn?

bias: one context, a thought of two tokens out of six, so 36 thoughts; a policy of tables and a reader of a table, both
drawn from a normal distribution. Expected gradients are sums over every group of thoughts (each multiset once, with its
multiplicity), or means over many drawn groups where there are too many.
bottleneck: one of 16 symbols must pass through one discrete thought of 16 to its reconstruction.
transformer: the biases again, on a small decoder and through the real rollout, under the microscope.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from thinking_lm.analysis.estimators import ESTIMATORS
from thinking_lm.analysis.microscope_report import aligned, number
from thinking_lm.analysis.tables import straight_through, trace
from thinking_lm.objectives.exact import marginal
from thinking_lm.objectives.objective import ObjectiveConfig, objective
from thinking_lm.thoughts import relaxed

V, Y = 6, 6
Z = V * V
TOKENS_Z2 = np.array(list(itertools.product(range(V), repeat=2)))
DRAWN = 20_000
"""Groups that are drawn where they are not enumerated."""

PUBLISHED_BIAS = dict(
  nll_only="0.45-0.34 / 0.79-0.50",
  rlp="0.88-0.92 / ",
  hybrid="0.00 / 0.61-0.40",
  quiet_star="0.28-0.23 / ",
  grpo="0.10-0.08 / ",
  gumbel="0.22-0.23 / ",
  vimco=" / 0.20-0.15 (G=16: 0.05)",
  jepo=" / 0.20-0.15 (G=16: 0.05)",
)
"""Figures of the design notes (two unnamed random initialisations): against grad J / grad M."""

PUBLISHED_BOTTLENECK = dict(
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
"""Mean p(x) of the same notes; chance is 0.0625."""


def goal(name: str) -> ObjectiveConfig:
  """The objective of a member of ESTIMATORS."""
  options = {key.partition(".")[2]: value for key, value in ESTIMATORS[name].items() if key.startswith("objective.")}
  return ObjectiveConfig(**options)


def _tables(seed: int):
  draw = np.random.default_rng(seed).normal
  sizes = dict(first_V=(V,), second_VV=(V, V), reader_VVY=(V, V, Y))
  return {name: jnp.asarray(draw(size=shape), jnp.float32) for name, shape in sizes.items()}


def _logs(params):
  """(log pi(z), log p(y | z)) of all thoughts, each [Z]; the target is y = 0."""
  first_V, second_VV = (jax.nn.log_softmax(params[name]) for name in ("first_V", "second_VV"))
  return (first_V[:, None] + second_VV).reshape(Z), jax.nn.log_softmax(params["reader_VVY"])[..., 0].reshape(Z)


def _exact(params, bound: str):
  logs = [a[None] for a in _logs(params)]
  return -objective(ObjectiveConfig(exact=True, bound=bound), marginal(trace(*logs, jnp.arange(Z)[None])))[0]


def _groups(params, G: int):
  """(index_XG of groups of thoughts, probability_X): all multisets if there are few enough, else drawn ones."""
  probability_Z = np.exp(np.asarray(_logs(params)[0], np.float64))
  if math.comb(Z + G - 1, G) < 100_000:
    index_XG = np.array(list(itertools.combinations_with_replacement(range(Z), G)))
    counts_XZ = (index_XG[:, :, None] == np.arange(Z)).sum(axis=1)
    ways_X = math.factorial(G) / np.vectorize(math.factorial)(counts_XZ).prod(axis=1)
    return index_XG, ways_X * probability_Z[index_XG].prod(axis=1)
  index_XG = np.random.default_rng(0).choice(Z, (DRAWN, G), p=probability_Z / probability_Z.sum())
  return index_XG, np.full(DRAWN, 1 / DRAWN)


def _estimate(params, config, index_G):
  """-loss of one group of thoughts."""
  policy_Z, outcome_Z = _logs(params)
  index_1G = index_G[None]
  return -objective(config, trace(policy_Z[index_1G], outcome_Z[index_1G], index_1G))[0]


def _straight_through(params, key):
  """-loss of one straight-through thought."""
  keys = jax.random.split(key)
  first_V = straight_through(params["first_V"], keys[0])
  second_V = straight_through(first_V @ params["second_VV"], keys[1])
  return jax.nn.log_softmax(jnp.einsum("u,v,uvy->y", first_V, second_V, params["reader_VVY"]))[0]


def flat(tree) -> np.ndarray:
  """All leaves as one float64 vector."""
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


@functools.partial(jax.jit, static_argnums=1)
def _expected(params, config, index_XG, probability_X):
  each = lambda params: jax.vmap(lambda index_G: _estimate(params, config, index_G))(index_XG)
  return jax.grad(lambda params: (probability_X * each(params)).sum())(params)


@functools.partial(jax.jit, static_argnums=1)
def _each(params, config, index_XG):
  return jax.lax.map(lambda index_G: jax.grad(_estimate)(params, config, index_G), index_XG, batch_size=500)


@functools.partial(jax.jit, static_argnums=1)
def _each_straight(params, G: int, keys_X):
  mean = lambda params, key: jax.vmap(lambda k: _straight_through(params, k))(jax.random.split(key, G)).mean()
  return jax.lax.map(lambda key: jax.grad(mean)(params, key), keys_X, batch_size=500)


def spread(trees) -> tuple[np.ndarray, float]:
  """(mean, root of the summed variance) of gradients stacked along their first axis."""
  rows = np.concatenate([np.reshape(leaf, (len(leaf), -1)) for leaf in jax.tree.leaves(trees)], axis=1).astype(float)
  return rows.mean(axis=0), float(np.sqrt(rows.var(axis=0).sum()))


def bias_of(name: str, params, G: int) -> tuple[np.ndarray, float]:
  """(expected gradient, standard deviation of one estimate) of an estimator on the tables."""
  if name == "gumbel":
    return spread(_each_straight(params, G, jax.random.split(jax.random.key(0), DRAWN)))
  config, (index_XG, probability_X) = goal(name), _groups(params, G)
  expected = flat(_expected(params, config, jnp.asarray(index_XG), jnp.asarray(probability_X, jnp.float32)))
  some = np.random.default_rng(1).choice(len(index_XG), 4000, p=probability_X / probability_X.sum())
  return expected, spread(_each(params, config, jnp.asarray(index_XG[some])))[1]


def bias() -> str:
  """The table of biases, two initialisations."""
  rows = [["bias to grad J, grad M; std / hybrid's", "seed 0", "seed 1", "design notes (J / M)"]]
  lines = [(name, 4) for name in PUBLISHED_BIAS] + [("vimco", 16), ("jepo", 16)]
  found = {}
  for seed in (0, 1):
    params = _tables(seed)
    wanted = {bound: flat(jax.grad(_exact)(params, bound)) for bound in ("J", "M")}
    relative = lambda got, bound, wanted=wanted: np.linalg.norm(got - wanted[bound]) / np.linalg.norm(wanted[bound])
    deviation = {}
    for name, G in lines:
      got, deviation[name, G] = bias_of(name, params, G)
      found[name, G, seed] = [relative(got, "J"), relative(got, "M"), deviation[name, G]]
    for name, G in lines:
      found[name, G, seed][2] /= deviation["hybrid", 4]
  for name, G in lines:
    cells = ["{:.2f}, {:.2f}; {:.2f}".format(*found[name, G, seed]) for seed in (0, 1)]
    rows.append([f"{name}, G = {G}", *cells, PUBLISHED_BIAS[name] if G == 4 else ""])
  return aligned(rows)


SYMBOLS, STEPS, RATE, SEEDS = 16, 1500, 0.03, 5
INITIAL = 0.3
"""Standard deviation of the tables before training."""


def _relaxed_outcome(params, policy_XX, token_XG, key):
  """log p(x | relaxed copy of the thought), differentiable in the policy only."""
  shape = (*token_XG.shape, SYMBOLS)
  keys = jax.random.split(key, token_XG.shape)
  z = relaxed.coupled(jnp.broadcast_to(policy_XX[:, None], shape), token_XG, keys)
  weights = relaxed.weights(z, ESTIMATORS["rebar"]["thought.relaxation"])
  logits_XGY = weights @ jax.lax.stop_gradient(params["reader_ZX"])
  return jax.nn.log_softmax(logits_XGY)[jnp.arange(SYMBOLS), :, jnp.arange(SYMBOLS)]


def _bottleneck_loss(name: str, G: int):
  """(params, key) -> loss of all symbols, each with G thoughts."""

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


def train(name: str, seeds: int = SEEDS, steps: int = STEPS, G: int = 4) -> np.ndarray:
  """Mean p(x) after training, of each seed: over symbols, of sum_z pi(z | x) p(x | z)."""
  loss, optimizer = _bottleneck_loss(name, G), optax.adam(RATE)

  def run(key):
    first, *draws = jax.random.split(key, 3)
    shape = (SYMBOLS, SYMBOLS)
    params = dict(
      policy_XZ=INITIAL * jax.random.normal(first, shape), reader_ZX=INITIAL * jax.random.normal(draws[0], shape)
    )

    def step(state, key):
      params, memory = state
      updates, memory = optimizer.update(jax.grad(loss)(params, key), memory)
      return (optax.apply_updates(params, updates), memory), None

    params, _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(draws[1], steps))[0]
    policy_XZ, reader_ZX = jax.nn.softmax(params["policy_XZ"]), jax.nn.softmax(params["reader_ZX"])
    return jnp.einsum("xz,zx->x", policy_XZ, reader_ZX).mean()

  return np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), seeds)))


def bottleneck() -> str:
  """The table of what is learned through a discrete bottleneck."""
  rows = [["mean p(x)", "ours", "each seed", "design notes"]]
  for name in (*PUBLISHED_BOTTLENECK, "jepo", "reinforce", "rebar"):
    p_S = train(name)
    published = number(PUBLISHED_BOTTLENECK.get(name), 2)
    rows.append([name, f"{p_S.mean():.2f}", " ".join(f"{p:.2f}" for p in p_S), published])
  return aligned(rows)


TOYS = dict(bias=bias, bottleneck=bottleneck)
"""name -> function that gives its table."""

TRANSFORMER = {
  **{"data.source": "task", "data.task.name": "word_problem", "data.task.length": 4, "data.sequence_length": 0},
  **{"model.layers": 1, "model.width": 16, "model.heads": 2, "model.mlp_width": 32},
  **{"thought.kind": "sampled", "thought.length": 2, "thought.topology": "private"},
  **{"thought.placement": "explicit", "thought.positions": (2,)},
}
"""The toy of biases on a real decoder: 49 thoughts of two tokens, at one place of an S3 word problem."""
