"""The toys: two published ones and one of our own, by this project's objectives: how biased, and does it learn?

bias: one context, a thought of two tokens out of six, so 36 thoughts; a policy of tables and a reader of a table, both
drawn from a normal distribution. Expected gradients are sums over every group of thoughts (each multiset once, with its
multiplicity), or means over many drawn groups where there are too many.
bottleneck, bottleneck_transformer: what is learned through one discrete thought, see `bottleneck.py`.
transformer: the biases again, on a small decoder and through the real rollout, under the microscope.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from thinking_lm.analysis import bottleneck
from thinking_lm.analysis.estimators import goal
from thinking_lm.analysis.microscope_report import aligned
from thinking_lm.analysis.tables import straight_through, trace
from thinking_lm.objectives.exact import marginal
from thinking_lm.objectives.objective import ObjectiveConfig, objective

V, Y = 6, 6
Z = V * V
TOKENS_Z2 = np.array(list(itertools.product(range(V), repeat=2)))
DRAWN = 20_000
"""Groups that are drawn where they are not enumerated."""

INITIALISATIONS = 12

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


def bias(seeds: int = INITIALISATIONS) -> str:
  """The table of biases: median, lowest and highest of so many initialisations."""
  rows = [["estimator", "bias to grad J", "bias to grad M", "std / hybrid's", "design notes (J / M)"]]
  lines = [(name, 4) for name in PUBLISHED_BIAS] + [("vimco", 16), ("jepo", 16)]
  found_SL3 = np.array([_biases(_tables(seed), lines) for seed in range(seeds)])
  found_SL3[:, :, 2] /= found_SL3[:, [lines.index(("hybrid", 4))], 2]
  for i, (name, G) in enumerate(lines):
    quantiles_Q3 = np.quantile(found_SL3[:, i], (0.5, 0, 1), axis=0)
    cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*quantiles_Q) for quantiles_Q in quantiles_Q3.T]
    rows.append([f"{name}, G = {G}", *cells, PUBLISHED_BIAS[name] if G == 4 else ""])
  return aligned(rows)


def _biases(params, lines) -> list[list[float]]:
  """[relative bias to grad J, to grad M, standard deviation] of each (estimator, G)."""
  wanted = [flat(jax.grad(_exact)(params, bound)) for bound in ("J", "M")]
  found = []
  for name, G in lines:
    got, deviation = bias_of(name, params, G)
    found.append([*[np.linalg.norm(got - exact) / np.linalg.norm(exact) for exact in wanted], deviation])
  return found


TOYS = dict(
  bias=bias,
  bottleneck=functools.partial(bottleneck.report, bottleneck.THINKERS["tables"]),
  bottleneck_transformer=functools.partial(bottleneck.report, bottleneck.THINKERS["transformer"]),
)
"""name -> function that gives its table."""

TRANSFORMER = {
  **{"data.source": "task", "data.task.name": "word_problem", "data.task.length": 4, "data.sequence_length": 0},
  **{"model.layers": 1, "model.width": 16, "model.heads": 2, "model.mlp_width": 32},
  **{"thought.kind": "sampled", "thought.length": 2, "thought.topology": "private"},
  **{"thought.placement": "explicit", "thought.positions": (2,)},
}
"""The toy of biases on a real decoder: 49 thoughts of two tokens, at one place of an S3 word problem."""
