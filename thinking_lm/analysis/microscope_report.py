"""What the microscope found, for people: aligned tables and a plot."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from thinking_lm.analysis.microscope import NUMBERS, parts
from thinking_lm.errors import ConfigError

LEGEND = (
  "bias: |E estimate - g| / |g|, (<) its upper end at two standard errors; std: of one estimate, / |g|; error: root "
  "mean squared |estimate - g| / |g|; cosine: of E estimate with g, (>) its lower end at two standard errors; signal: "
  "|E estimate along g|^2 / variance"
)


def aligned(rows: Sequence[Sequence[str]]) -> str:
  """Columns of equal width, the first one to the left and the others to the right."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = [
    "  ".join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in rows
  ]
  return "\n".join(line.rstrip() for line in lines)


def number(value: float | None, digits: int = 3) -> str:
  """A number of so many significant digits, - where there is none."""
  return "-" if value is None else f"{value:.{digits}g}"


def _against(bound: str, reference: Mapping[str, Any], result: Mapping[str, Any]) -> str:
  rows = [["estimator", "bias", "(<)", "std", "error", "cosine", "(>)", "signal", "signal/GFLOP", "ESS", "flat groups"]]
  for name, found in result.items():
    n = found["against"][bound]["all"]
    cells = [n[what] for what in NUMBERS]
    rows.append([name, *map(number, cells), number(found["effective_samples"]), number(found["flat_groups"])])
  error = f", standard error {number(reference['standard_error'])}" if reference["standard_error"] else ""
  return f"against g = grad {bound}, {reference['how']}; |g| {number(reference['norm'])}{error}\n{aligned(rows)}"


def _by_part(bound: str, result: Mapping[str, Any]) -> str:
  names = parts(result)
  rows = [["bias / std", *names]]
  for name, found in result.items():
    cells = [found["against"][bound].get(part) for part in names]
    rows.append([name, *(f"{number(c['bias'], 2)} / {number(c['std'], 2)}" if c else "-" for c in cells)])
  return f"by part of the model, against grad {bound}\n{aligned(rows)}"


def _iterated(found: Mapping[str, Any]) -> str:
  """Of parallel iterations: what their gradient is worth."""
  rows = [["part of the model", "|g - g_serial| / |g_serial|", "cosine"]]
  rows += [[part, number(one["gap"]), number(one["cosine"])] for part, one in found["against"].items()]
  title = (
    f"gradient g of {found['iterations']} parallel iterations (through the last {found['through']}), residual "
    f"{number(found['residual'])}, at {number(found['flops'])} x the FLOPs of the serial chain"
  )
  return f"{title}\n{aligned(rows)}"


def table(found: Mapping[str, Any]) -> str:
  """All of a result as text."""
  blocks = [_against(bound, reference, found["estimators"]) for bound, reference in found["references"].items()]
  blocks += [_by_part(bound, found["estimators"]) for bound in found["references"]]
  if found["iterated"]:
    blocks.append(_iterated(found["iterated"]))
  if found["refused"]:
    blocks.append("\n".join(f"left out {name}: {reason}" for name, reason in found["refused"].items()))
  return "\n\n".join([*blocks, LEGEND])


def plot(found: Mapping[str, Any], path: pathlib.Path) -> None:
  """Bias against standard deviation, and signal per GFLOP, for each bound, as an image. Raises ConfigError."""
  try:
    import matplotlib
  except ImportError as error:
    raise ConfigError("a plot needs matplotlib: pip install 'thinking_lm[report]'") from error
  matplotlib.use("Agg")
  from matplotlib import pyplot

  bounds = list(found["references"])
  figure, axes = pyplot.subplots(2, len(bounds), figsize=(5 * len(bounds), 8), squeeze=False)
  for column, bound in enumerate(bounds):
    numbers = {name: one["against"][bound]["all"] for name, one in found["estimators"].items()}
    upper, lower = axes[0][column], axes[1][column]
    for name, n in numbers.items():
      if n["bias"] is not None:
        upper.plot([n["std"]], [n["bias"]], "o")
        upper.annotate(name, (n["std"], n["bias"]), fontsize=8, xytext=(3, 3), textcoords="offset points")
    upper.set(title=f"against grad {bound}", xlabel="std of one estimate / |g|", ylabel="bias / |g|")
    signals = {name: n["signal_per_gflop"] for name, n in numbers.items() if n["signal_per_gflop"]}
    lower.barh(list(signals), list(signals.values()))
    lower.set(xlabel="signal / GFLOP", xscale="log")
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)
