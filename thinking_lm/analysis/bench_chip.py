"""Suite `chip`: temporary memory of the private step on one TPU v5e, compiled ahead of time. Needs libtpu.

Run it in the environment that `make plan` sets up: .venv-plan/bin/python -m thinking_lm.bench --suite=chip
(--case=alone: ours only).
"""

from collections.abc import Iterator

import jax
from jax.sharding import SingleDeviceSharding

from thinking_lm.analysis import bench_problem as problem
from thinking_lm.analysis import chips
from thinking_lm.analysis.bench import Bar, Case, Results, Variant
from thinking_lm.analysis.bench_private import goal, thought

V, T, B, N = 32_000, 512, 4, 8
SIZES = dict(layers=4, width=1024, heads=8, mlp_width=2816)
GIB = 2**30


def _gib(results: Results, name: str) -> float:
  return results[name].temp_bytes / GIB


BARS = (
  Bar("private, temporary GiB", lambda r: _gib(r, "private"), 2.7),
  Bar("private / equal-token remat step", lambda r: _gib(r, "private") / _gib(r, "equal_remat"), 1.2),
)


def cases() -> Iterator[Case]:
  """Gradients of one step in float32: ours, ours by autodiff through the drawing loop, and plain on as many tokens."""
  shape = f"v5e_D1024_V{V}_T{T}_B{B}_n{N}"
  yield Case(f"{shape}_alone", lambda: list(variants("v5e:1x1", "private")), BARS[:1], timed=False)
  yield Case(f"{shape}_against", lambda: list(variants("v5e:1x1")), BARS, timed=False)


def variants(topology: str, *names: str) -> Iterator[Variant]:
  """Of those names, or all. `naive` differentiates the loop that draws; what does not fit shows what it needs."""
  device = chips.pod(topology)[1][0]
  steps = dict(
    private=(problem.loss(model(), thought(N), goal(1)), B),
    equal_remat=(problem.plain(model(remat="full")), (1 + N) * B),
    plain_remat=(problem.plain(model(remat="full")), B),
    naive=(problem.loss(model(), thought(N, rescore=False), goal(1)), B),
  )
  for name in names or steps:
    total, rows = steps[name]
    arguments = (model().shapes, jax.eval_shape(lambda rows=rows: problem.batch(rows, T, V)))
    yield Variant(name, problem.gradient(total), placed(arguments, device), tokens=rows * T)


def model(**options):
  """The decoder of the bar."""
  return problem.model(V, **SIZES, **options)


def placed(arguments, device):
  """Abstract arrays on a device that is not here."""
  where = SingleDeviceSharding(device)
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), arguments)
