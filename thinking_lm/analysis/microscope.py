"""How biased and how noisy is a gradient? Moments of an estimator over many draws, held against a reference gradient.

One batch of rows, one set of parameters. An estimate is the gradient of -loss per target, for one key. With K groups of
estimates, whose means are independent, squared norms of expectations are estimated without a bias of their own:
products are only taken between different groups. All numbers are given for all parameters and for each part of a model.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from thinking_lm.metrics import Mean
from thinking_lm.types import Batch, Params

GROUPS = 8
"""K, into how many groups the estimates are split."""

PARTS = dict(
  heads=("heads",),
  attention=("query", "key", "value", "out"),
  mlp=("gate", "up", "down"),
  norm=("attention_norm", "mlp_norm", "final_norm", "query_norm", "key_norm"),
  embedding=("embedding",),
  head=("head",),
)
"""Part of the model -> names on the paths of its parameters, the first that fits; whatever has none is part `other`."""


class Estimator(NamedTuple):
  """loss: (params, batch, key) -> (loss summed over targets, metrics with its `loss`). flops: of one gradient of the
  batch. draws: whether two keys can give two gradients.
  """

  loss: Callable[[Params, Batch, jax.Array], tuple[jax.Array, dict[str, Mean]]]
  flops: float
  draws: bool = True


class Moments(NamedTuple):
  """Of many estimates. means: gradient of each group, leaves [K, ...], float32; K is 1 where nothing is drawn. squares:
  mean of squared entries over all estimates. count: how many there are. told: mean metrics.
  """

  means: Any
  squares: Any
  count: int
  told: dict[str, float]


def part_of(path) -> str:
  """The part of the model that a parameter belongs to, by the names on its path."""
  names = {getattr(key, "key", None) for key in path}
  return next((part for part, members in PARTS.items() if names & set(members)), "other")


def moments(estimator: Estimator, params: Params, batch: Batch, key, replicates: int) -> Moments:
  """Moments of `replicates` estimates (rounded up to a multiple of GROUPS), or of one where nothing is drawn."""
  each = -(-replicates // GROUPS) if estimator.draws else 1

  @jax.jit  # traced once, here and in the scan
  def estimate(params, key):
    (_, metrics), grads = jax.value_and_grad(estimator.loss, has_aux=True)(params, batch, key)
    return jax.tree.map(lambda g: -g / jnp.maximum(metrics["loss"].count, 1.0), grads), metrics

  @jax.jit
  def group(params, keys):
    def add(total, key):
      grads, metrics = estimate(params, key)
      return jax.tree.map(jnp.add, total, (grads, jax.tree.map(jnp.square, grads), metrics)), None

    grads, metrics = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(estimate, params, keys[0]))
    zeros = (grads, grads, metrics)
    sums, squares, metrics = jax.lax.scan(add, zeros, keys)[0]
    return jax.tree.map(lambda a: a / each, (sums, squares)), metrics

  number = GROUPS if estimator.draws else 1
  keys = jax.random.split(key, (number, each))
  rows = [jax.device_get(group(params, keys[k])) for k in range(number)]
  stack = lambda trees: jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
  squares = jax.tree.map(lambda a: a.mean(axis=0, dtype=np.float64), stack([squares for (_, squares), _ in rows]))
  told = {name: sum(float(m[name].total) for _, m in rows) for name in rows[0][1]}
  counts = {name: sum(float(m[name].count) for _, m in rows) for name in told}
  told = {name: told[name] / counts[name] for name in told if counts[name]}
  return Moments(stack([means for (means, _), _ in rows]), squares, number * each, told)


class Reference(NamedTuple):
  """A gradient to compare with. grads: its leaves. spread: variance of each entry (0 if exact). how: in words."""

  grads: Any
  spread: Any
  how: str


def exact(found: Moments, how: str) -> Reference:
  """Of an estimator that draws nothing."""
  grads = jax.tree.map(lambda a: a[0], found.means)
  return Reference(grads, jax.tree.map(lambda a: np.zeros(()), grads), how)


def averaged(found: Moments, how: str) -> Reference:
  """The mean of many estimates, with the variance that this mean has."""
  spread = jax.tree.map(lambda a: a.var(axis=0, ddof=1, dtype=np.float64) / len(a), found.means)
  return Reference(jax.tree.map(lambda a: a.mean(axis=0, dtype=np.float64), found.means), spread, how)


class _Flat(NamedTuple):
  """One part of the model: means_KX, variance (summed over entries) of one estimate; reference_X and its variance."""

  means_KX: np.ndarray
  variance: float
  reference_X: np.ndarray
  blur: float


def _parts(found: Moments, reference: Reference) -> dict[str, _Flat]:
  leaves = jax.tree_util.tree_leaves_with_path(reference.grads)
  aligned = [jax.tree.leaves(tree) for tree in (found.means, found.squares, reference.spread)]
  columns: dict[str, list[tuple]] = {"all": []}
  for (path, wanted), means, squares, spread in zip(leaves, *aligned, strict=True):
    means_KX = np.reshape(means, (len(means), -1)).astype(np.float64)
    unbiased = found.count / max(found.count - 1, 1)
    variance = unbiased * max(float(squares.sum() - (means_KX.mean(axis=0) ** 2).sum()), 0.0) if len(means) > 1 else 0.0
    row = (means_KX, variance, np.ravel(wanted).astype(np.float64), float(np.sum(spread)))
    for part in ("all", part_of(path)):
      columns.setdefault(part, []).append(row)
  return {
    part: _Flat(
      np.concatenate([row[0] for row in rows], axis=1),
      sum(row[1] for row in rows),
      np.concatenate([row[2] for row in rows]),
      sum(row[3] for row in rows),
    )
    for part, rows in columns.items()
  }


def _square(means_KX: np.ndarray) -> float:
  """||E mean||^2 without the variance of the mean: products of different groups only."""
  K = len(means_KX)
  if K == 1:
    return float((means_KX[0] ** 2).sum())
  total = float((means_KX.sum(axis=0) ** 2).sum())
  return (total - float((means_KX**2).sum())) / (K * (K - 1))


def _with_error(means_KX: np.ndarray) -> tuple[float, float]:
  """(`_square`, its standard error by leaving out each group in turn)."""
  value, K = _square(means_KX), len(means_KX)
  if K == 1:
    return value, 0.0
  left = np.array([_square(np.delete(means_KX, k, axis=0)) for k in range(K)])
  return value, math.sqrt((K - 1) / K * float(((left - left.mean()) ** 2).sum()))


def _cosine(means_KX: np.ndarray, reference_X: np.ndarray) -> float | None:
  """Of the expected estimate with g; None where its length cannot be told from noise."""
  square, norm = _square(means_KX), float(np.linalg.norm(reference_X))
  if square <= 0:
    return None
  return max(-1.0, min(1.0, float(means_KX.mean(axis=0) @ reference_X) / (math.sqrt(square) * norm)))


def _cosine_above(means_KX: np.ndarray, reference_X: np.ndarray) -> float | None:
  """The lower end of `_cosine` at two standard errors, by leaving out each group in turn; None as there."""
  K, value = len(means_KX), _cosine(means_KX, reference_X)
  if K == 1 or value is None:
    return value
  left = [_cosine(np.delete(means_KX, k, axis=0), reference_X) for k in range(K)]
  if None in left:
    return None
  return max(-1.0, value - 2 * math.sqrt((K - 1) / K * float(((np.array(left) - np.mean(left)) ** 2).sum())))


def compare(found: Moments, reference: Reference, flops: float) -> dict[str, dict[str, float | None]]:
  """part -> numbers of an estimator against a reference g.

  bias: ||E estimate - g|| / ||g||, and bias_below, its upper end at two standard errors. std: root of the summed
  variance of one estimate, / ||g||. error: root mean squared ||estimate - g|| / ||g||. cosine: of E estimate with g,
  and cosine_above, its lower end at two standard errors, None where E estimate may as well be 0.
  signal: squared length of E estimate along g over the summed variance of one estimate, and signal_per_gflop; as n
  estimates have n times that signal at n times the FLOPs, the latter compares estimators of any cost. None where it is
  infinite or where g is 0.
  """
  result = {}
  for part, flat in _parts(found, reference).items():
    norm = math.sqrt(max(float((flat.reference_X**2).sum()) - flat.blur, 0.0))
    if not norm:
      result[part] = dict.fromkeys(NUMBERS)
      continue
    bias, doubt = _with_error(flat.means_KX - flat.reference_X)
    bias, doubt = bias - flat.blur, math.hypot(doubt, flat.blur)
    along = float(flat.means_KX.mean(axis=0) @ flat.reference_X) / norm
    signal = along**2 / flat.variance if flat.variance else None
    result[part] = dict(
      bias=math.sqrt(max(bias, 0.0)) / norm,
      bias_below=math.sqrt(max(bias, 0.0) + 2 * doubt) / norm,
      std=math.sqrt(flat.variance) / norm,
      error=math.sqrt(max(bias, 0.0) + flat.variance) / norm,
      cosine=_cosine(flat.means_KX, flat.reference_X),
      cosine_above=_cosine_above(flat.means_KX, flat.reference_X),
      signal=signal,
      signal_per_gflop=None if signal is None else signal / (flops / 1e9),
    )
  return result


NUMBERS = ("bias", "bias_below", "std", "error", "cosine", "cosine_above", "signal", "signal_per_gflop")


def examine(
  estimators: dict[str, Estimator],
  references: dict[str, Reference],
  params: Params,
  batch: Batch,
  key,
  replicates: int,
  progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, dict[str, Any]]:
  """estimator -> dict(flops, draws, estimates, effective_samples, flat_groups, against={bound: {part: numbers}})."""
  result = {}
  for number, (name, estimator) in enumerate(estimators.items()):
    progress(name, number, len(estimators))
    found = moments(estimator, params, batch, jax.random.fold_in(key, number), replicates)
    result[name] = dict(
      flops=estimator.flops,
      draws=estimator.draws,
      estimates=found.count,
      effective_samples=found.told.get("effective_samples"),
      flat_groups=found.told.get("flat_groups"),
      against={bound: compare(found, reference, estimator.flops) for bound, reference in references.items()},
    )
  progress("", len(estimators), len(estimators))
  return result


def describe(references: dict[str, Reference]) -> dict[str, dict[str, Any]]:
  """bound -> dict(how, norm of the gradient, standard error of the gradient)."""
  norm = lambda tree: math.sqrt(sum(float((np.asarray(a, np.float64) ** 2).sum()) for a in jax.tree.leaves(tree)))
  blur = lambda tree: math.sqrt(sum(float(np.sum(a)) for a in jax.tree.leaves(tree)))
  return {
    bound: dict(how=reference.how, norm=norm(reference.grads), standard_error=blur(reference.spread))
    for bound, reference in references.items()
  }


def parts(result: dict[str, dict[str, Any]]) -> Sequence[str]:
  """The parts of the model that any estimator was compared on, `all` first."""
  found = {part for one in result.values() for numbers in one["against"].values() for part in numbers}
  return ["all", *(part for part in (*PARTS, "other") if part in found)]
