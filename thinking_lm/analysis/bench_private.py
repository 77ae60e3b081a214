"""Suite `private`: a step with sampled private thoughts at every token against the plain step on as many tokens.

Steps are gradients of the loss, without the optimizer. `equal` is the plain step on (1 + G n) B rows of T tokens: it
does as many FLOPs as the thoughts need at least, but for the longer context of a thought.
"""

from collections.abc import Iterator

import jax

from thinking_lm.analysis import bench_problem as problem
from thinking_lm.analysis.bench import COMPILE, GROWING, Bar, Case, Variant, ratio
from thinking_lm.objectives.objective import ObjectiveConfig
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.thoughts.tokens import draw

LARGE, SMALL = 32_000, 512
"""Vocabularies."""


def thought(n: int, G: int = 1, **options) -> ThoughtConfig:
  """Sampled, private, after every token."""
  return ThoughtConfig(placement="every", topology="private", kind="sampled", length=n, samples=G, **options)


def goal(G: int) -> ObjectiveConfig:
  """Both terms of grad J, and the base pass."""
  advantage = "leave_one_out" if G > 1 else "none"
  return ObjectiveConfig(score_weight=1.0, base_weight=1.0, reward="info_gain", advantage=advantage)


def cases() -> Iterator[Case]:
  """Time and memory by n, samples, vocabulary and length; then compile time and memory alone."""
  for n, bar in ((4, 1.15), (8, 1.2), (16, 1.25)):
    yield Case(f"V512_T128_B4_n{n}", lambda n=n: list(steps(SMALL, 128, 4, n)), _equal_bars(bar))
  yield Case("V512_T128_B4_n4_G4", lambda: list(_samples(SMALL, 128, 4, 4)), (SAMPLE,))
  yield Case("V512_T256_B4_n16", lambda: list(steps(SMALL, 256, 4, 16)), _equal_bars(1.25))
  yield Case("V32000_T128_B1_n8", lambda: list(steps(LARGE, 128, 1, 8)), _equal_bars(1.2))
  yield Case("V32000_drawing", lambda: list(_drawing(128, 8)), (DRAWING,))
  yield Case("compile", lambda: list(_growing()), GROWTH, timed=False)


def _equal_bars(limit: float):
  best = lambda r: max(ratio(r, "private", name) for name in ("equal", "equal_remat"))
  memory = lambda r: r["private"].temp_bytes / r["equal_remat"].temp_bytes
  return Bar("private / the faster equal-token step", best, limit), Bar("temp / equal-token remat step", memory, 1.2)


def _private(V, T, B, n, G=1, name="private", **options) -> Variant:
  model = problem.model(V, **options)
  step = problem.gradient(problem.loss(model, thought(n, G), goal(G)))
  work = problem.work(model, thought(n, G), B, T)
  return Variant(name, step, (problem.params(model), problem.batch(B, T, V)), *work, (1 + G * n) * B * T)


def _plain(V, T, B, name, **options) -> Variant:
  model = problem.model(V, **options)
  work = problem.work(model, ThoughtConfig(length=0), B, T)
  step = problem.gradient(problem.plain(model))
  return Variant(name, step, (problem.params(model), problem.batch(B, T, V)), *work, B * T)


def steps(V: int, T: int, B: int, n: int) -> Iterator[Variant]:
  """The plain step, the plain step on as many tokens, and the step with thoughts."""
  yield _plain(V, T, B, "plain")
  yield _plain(V, T, (1 + n) * B, "equal")
  yield _plain(V, T, (1 + n) * B, "equal_remat", remat="full")
  yield _private(V, T, B, n)


def _samples(V, T, B, n) -> Iterator[Variant]:
  yield _plain(V, T, B, "plain")
  for G in (1, 4):
    yield _private(V, T, B, n, G, f"G{G}")


SAMPLE = Bar(
  "one more sample / n plain steps", lambda r: (ratio(r, "G4", "plain") - ratio(r, "G1", "plain")) / (3 * 4), 1.25
)


def _drawing(X: int, n: int) -> Iterator[Variant]:
  """n draws for each of X streams from logits that are there, against the whole step that has them."""
  yield _private(LARGE, X, 1, n)
  logits = jax.random.normal(jax.random.key(0), (X, LARGE + 3))
  keys = jax.random.split(jax.random.key(1), X * n).reshape(n, X)
  one_by_one = lambda function: lambda logits, keys: jax.lax.map(lambda keys: function(logits, keys), keys)
  categorical = jax.vmap(lambda logits, key: jax.random.categorical(key, logits))
  yield Variant("draws", one_by_one(lambda logits, keys: draw(logits, keys, 1.0)), (logits, keys))
  yield Variant("draws by Gumbel noise", one_by_one(categorical), (logits, keys))


DRAWING = Bar("draws / step", lambda r: ratio(r, "draws", "private"), 0.05)


def _growing() -> Iterator[Variant]:
  for name, (n, layers) in GROWING.items():
    yield _private(SMALL, 128, 4, n, name=name, layers=layers)


GROWTH = (
  *COMPILE,
  Bar("temp, n 16 / n 4", lambda r: r["n16_L4"].temp_bytes / r["n4_L4"].temp_bytes, 17 / 5 * 1.2),
)
