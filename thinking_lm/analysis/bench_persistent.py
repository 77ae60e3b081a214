"""Suite `persistent`: the gradient of serial thoughts in the context against one parallel pass over the same slots."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from thinking_lm.analysis import bench_problem as problem
from thinking_lm.analysis.bench import COMPILE, GROWING, Bar, Case, Results, Variant, ratio
from thinking_lm.model.decoder import Model
from thinking_lm.objectives.objective import ObjectiveConfig
from thinking_lm.thoughts.spec import ThoughtConfig

V = 512

LATENT = dict(
  every_B8_S160=(8, 32, 4.0, dict(placement="every", length=4)),
  every_B8_S320=(8, 64, 4.0, dict(placement="every", length=4)),
  every_B64_S80=(64, 16, 2.2, dict(placement="every", length=4)),
  stride16_B8_T64=(8, 64, 2.0, dict(placement="stride", stride=16, length=4)),
  stride16_B8_T256=(8, 256, 2.0, dict(placement="stride", stride=16, length=4)),
)
"""B, T, the bar on the time over one parallel pass, and the thought."""

COCONUT = dict(
  coconut_T128=(4, 128, 1.5, dict(placement="explicit", positions=(62,), length=4)),
  coconut_T256=(4, 256, 1.3, dict(placement="explicit", positions=(126,), length=8)),
)
"""A question, one thought, the answer (arXiv:2412.06769), with the bar on the time over a plain step on as many tokens
as there are slots."""


def cases() -> Iterator[Case]:
  """Latent thoughts against pause thoughts, which are known beforehand: the same slots in one parallel pass.

  Then the gradient against that of exact parallel passes, and compile time alone.
  """
  for name, (B, T, limit, options) in LATENT.items():
    bars = (
      Bar("latent / one parallel pass over its slots", lambda r: ratio(r, "latent", "parallel"), limit),
      Bar("temporary bytes, latent / parallel", lambda r: r["latent"].temp_bytes / r["parallel"].temp_bytes, 1.2),
    )
    yield Case(name, lambda B=B, T=T, options=options: list(variants(B, T, options)), bars)
  for name, (B, T, limit, options) in COCONUT.items():
    bars = (Bar("latent / plain on as many tokens as slots", lambda r: ratio(r, "latent", "plain"), limit),)
    yield Case(name, lambda B=B, T=T, options=options: list(variants(B, T, options)), bars)

  bars = (
    Bar("gradient, relative L2 to autodiff of exact parallel passes", lambda r: apart(r, "latent", "exact"), 1e-4),
  )
  yield Case("gradient_B1_S160", lambda: list(_exact(1, 32, 4)), bars, timed=False)
  yield Case("compile", lambda: list(_growing()), COMPILE, timed=False)


def apart(results: Results, name: str, other: str) -> float:
  """Relative L2 distance of what one variant computes from what the other does."""
  made = [results[each].variant for each in (name, other)]
  found, wanted = (ravel_pytree(jax.jit(one.function)(*one.arguments))[0] for one in made)
  return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))


def variants(B: int, T: int, options: dict) -> Iterator[Variant]:
  """In the Coconut shape T counts the thought's slots too, as the paper's code does."""
  model = problem.model(V)
  real = T - options["length"] if options["placement"] == "explicit" else T
  thoughts = dict(
    plain=(ThoughtConfig(length=0), T),
    parallel=(ThoughtConfig(kind="pause", **options), real),
    latent=(ThoughtConfig(kind="latent", **options), real),
  )
  for name, (thought, length) in thoughts.items():
    yield _variant(name, model, thought, B, length)


def _variant(name: str, model: Model, thought: ThoughtConfig, B: int, T: int) -> Variant:
  total = problem.loss(model, thought, ObjectiveConfig())
  arguments = (problem.params(model), problem.batch(B, T, V))
  return Variant(name, problem.gradient(total), arguments, *problem.work(model, thought, B, T), B * T)


def _exact(B: int, T: int, n: int) -> Iterator[Variant]:
  """T n + 1 parallel passes make every thought what it is in the stream (`model/jacobi.py`)."""
  options = dict(kind="latent", placement="every", length=n)
  for name, iterations in dict(latent=0, exact=T * n + 1).items():
    yield _variant(name, problem.model(V), ThoughtConfig(**options, iterations=iterations), B, T)


def _growing() -> Iterator[Variant]:
  for name, (n, layers) in GROWING.items():
    thought = ThoughtConfig(kind="latent", placement="every", length=n)
    yield _variant(name, problem.model(V, layers=layers), thought, 8, 32)
