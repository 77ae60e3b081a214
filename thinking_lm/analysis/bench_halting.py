"""Whether decoding really stops: time per token against the mean length of thoughts that a head ends at random."""

import functools
from collections.abc import Iterator

import jax
import numpy as np

from thinking_lm.analysis import bench_problem as problem
from thinking_lm.analysis.bench import Bar, Case, Variant
from thinking_lm.model.decoder import Model
from thinking_lm.model.generate import Sampling, generate
from thinking_lm.thoughts.spec import ThoughtConfig

V, n, TOKENS, PROMPT = 512, 16, 24, 8
CHANCES = (0.0, 0.05, 0.2, 0.5, 1.0)
"""Of ending before each think token; the same in every row, so that the lengths of a batch are independent."""
THOUGHT = ThoughtConfig(
  **dict(placement="every", topology="private", kind="latent", length=n, halting="ponder", stop_at=0.0)
)


def lengths(chance: float, rows: int) -> tuple[float, float]:
  """(mean length of a thought, the same of the row of `rows` that thinks most in all, on average)."""
  beyond = (1 - chance) ** np.arange(1, n + 1)  # P(length >= j)
  made = np.minimum(np.random.default_rng(0).geometric(max(chance, 1e-9), (2000, rows, TOKENS)) - 1, n)
  return float(beyond.sum()), float(made.mean(axis=-1).max(axis=-1).mean())


def cases() -> Iterator[Case]:
  """Alone and in a batch, which is decoded until the row that thinks most is done."""
  for rows in (1, 8):
    yield Case(f"B{rows}_n{n}", functools.partial(variants, rows), [_bar(chance, rows) for chance in CHANCES[1:-1]])


def _name(chance: float) -> str:
  return f"mean_{lengths(chance, 1)[0]:.1f}"


def _bar(chance: float, rows: int) -> Bar:
  """Thinking time that is left over that of full thoughts, against the share of the turns that are left."""
  mean, longest = lengths(chance, rows)

  def left(results):
    seconds = [results[_name(each)].median for each in (chance, CHANCES[0], CHANCES[-1])]
    return (seconds[0] - seconds[2]) / (seconds[1] - seconds[2])

  what = f"thinking time left at mean length {mean:.1f} of {n} ({mean / n:.2f} with every row by itself)"
  return Bar(what, left, 1.25 * longest / n)


def variants(rows: int) -> list[Variant]:
  """Decoding of the same prompts at each chance: one program, other parameters."""
  model = Model(problem.model(V).config, V, heads=("halt",))
  vocabulary = problem.endless(V)
  decode = functools.partial(generate, model, THOUGHT, vocabulary=vocabulary, sampling=Sampling(TOKENS))
  found, params, batch = [], problem.params(model), problem.batch(rows, PROMPT, V)
  for chance in CHANCES:
    odds = np.clip(np.log(max(chance, 1e-30) / max(1 - chance, 1e-30)), -30, 30)
    heads = jax.tree.map(lambda a: a * 0, params["heads"])
    heads["halt"]["bias"] += odds
    function = lambda params, batch: decode(params, batch, key=jax.random.key(0)).tokens_BX
    found.append(Variant(_name(chance), function, (params | dict(heads=heads), batch), tokens=rows * TOKENS))
  return found
