"""Measuring variants of one piece of work against each other, in one process.

Two cores that others use too make absolute times worthless: what is trusted is a ratio of CPU seconds, variant against
reference in the same round (A B C A B C ...), and its median over the rounds. An accelerator's clock is the wall's.
A suite (bench_suites.py) is a function that gives cases; a case is a few variants and the bars that they are held to.
"""

import dataclasses
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from thinking_lm.analysis import ahead, chips


class Variant(NamedTuple):
  """One way to do the work of a case.

  function, arguments: what is timed: a pure function of arrays, or any callable of the host with compiled = False.
  flops: FLOPs that the work needs by the ledger (not those that this variant spends): its floor; 0 if unknown.
  moved: bytes that our way to do it moves between memory and chip by the ledger (`analysis/traffic.py`), whatever this
  variant does; 0 if unknown.
  tokens: what `tokens_per_second` counts. after: what follows each call and is not timed.
  """

  name: str
  function: Callable
  arguments: tuple = ()
  flops: float = 0.0
  moved: float = 0.0
  tokens: int = 0
  compiled: bool = True
  after: Callable[[], Any] = lambda: None


@dataclasses.dataclass
class Result:
  """What was measured of a variant.

  seconds: CPU seconds of each round (wall seconds on an accelerator). compile_seconds: CPU seconds of XLA.
  temp_bytes: what the compiled program needs besides its arguments and results; all that it needs, where a chip's
  compiler refused it. xla_flops, xla_bytes: XLA's own counts of FLOPs and of bytes accessed; loop bodies count once.
  """

  variant: Variant
  seconds: list[float] = dataclasses.field(default_factory=list)
  compile_seconds: float = 0.0
  temp_bytes: int = 0
  xla_flops: float = 0.0
  xla_bytes: float = 0.0

  @property
  def median(self) -> float:
    """Seconds; NaN if it was only compiled."""
    return statistics.median(self.seconds) if self.seconds else float("nan")

  @property
  def mfu(self) -> float:
    """Share of the chip's peak (bfloat16, `chips.CHIPS`) that the needed FLOPs take; NaN on a chip that it has not."""
    peak = chips.peak(jax.devices()[:1])
    return self.variant.flops / self.median / peak if peak and self.variant.flops else float("nan")

  @property
  def tokens_per_second(self) -> float:
    """Of the median."""
    return self.variant.tokens / self.median


Results = Mapping[str, Result]


class Bar(NamedTuple):
  """A number that a case is held to: `value(results)` must be at most `limit` (or at least, with at_most = False)."""

  what: str
  value: Callable[[Results], float]
  limit: float
  at_most: bool = True


class Case(NamedTuple):
  """Variants that are compared at one shape.

  make: the variants, built when the case's turn comes; the first is the reference of the ratios.
  timed: False compiles only, for memory and compile time.
  """

  name: str
  make: Callable[[], Sequence[Variant]]
  bars: Sequence[Bar] = ()
  timed: bool = True


def ratio(results: Results, name: str, other: str) -> float:
  """Time of one variant over another's: the median over rounds of the ratio within the round."""
  pairs = zip(results[name].seconds, results[other].seconds, strict=True)
  return statistics.median(a / b for a, b in pairs)


GROWING = dict(n4_L4=(4, 4), n16_L4=(16, 4), n4_L16=(4, 16))
"""Variants of a case that is only compiled: think tokens and layers, each four times larger."""

COMPILE = (
  Bar("compile seconds, n 4", lambda r: r["n4_L4"].compile_seconds, 10),
  Bar("compile, n 16 / n 4", lambda r: r["n16_L4"].compile_seconds / r["n4_L4"].compile_seconds, 1.2),
  Bar("compile, 16 layers / 4", lambda r: r["n4_L16"].compile_seconds / r["n4_L4"].compile_seconds, 1.2),
)
"""Their bars: CPU seconds, and that these do not grow."""


def over_floor(results: Results, name: str, other: str) -> float:
  """Time ratio over FLOP ratio: 1 if `name` does its work at the FLOP rate of `other`."""
  flops = [results[each].variant.flops for each in (name, other)]
  return ratio(results, name, other) * flops[1] / flops[0] if all(flops) else float("nan")


def clock() -> float:
  """CPU seconds of this process where it computes itself, else wall seconds."""
  return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def measure(case: Case, rounds: int, say: Callable[[str], Any], trace: str | None = None) -> Results:
  """Compiles all variants of a case and times them round by round.

  Args:
    say: told what is going on, a line at a time.
    trace: a directory for a JAX profiler trace of one more round.
  """
  results, ready = {}, {}
  for variant in case.make():
    say(f"{case.name}: {variant.name}: compiling" if variant.compiled else f"{case.name}: {variant.name}")
    results[variant.name] = result = Result(variant)
    ready[variant.name] = variant.function
    if variant.compiled:
      ready[variant.name] = _compile(variant, result)

  for name in [name for name, function in ready.items() if case.timed and function is None]:
    say(f"{case.name}: {name} does not fit: it needs {results.pop(name).temp_bytes / 2**30:.2f} GiB")

  def once(name):
    start = clock()
    jax.block_until_ready(ready[name](*results[name].variant.arguments))
    seconds = clock() - start
    results[name].variant.after()
    return seconds

  for name in results if case.timed else ():  # the first call is not like the others
    once(name)

  for number in range(rounds if case.timed else 0):
    for name, result in results.items():
      result.seconds.append(once(name))
    took = ", ".join(f"{name} {result.seconds[-1]:.3g} s" for name, result in results.items())
    say(f"{case.name}: round {number + 1} of {rounds}: {took}")
  if trace and case.timed:
    with jax.profiler.trace(trace):
      for name in results:
        with jax.profiler.TraceAnnotation(f"{case.name}: {name}"):
          once(name)
  return results


def _compile(variant: Variant, result: Result):
  lowered = jax.jit(variant.function).lower(*variant.arguments)
  start = time.process_time()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    needed = ahead.needed(error)
    if needed is None:
      raise
    result.temp_bytes = needed  # more than the chip has, but a number that memory can be compared by
    return None
  finally:
    result.compile_seconds = time.process_time() - start
  result.temp_bytes = compiled.memory_analysis().temp_size_in_bytes
  counts = compiled.cost_analysis() or {}
  result.xla_flops, result.xla_bytes = counts.get("flops", 0.0), counts.get("bytes accessed", 0.0)
  return compiled


def table(case: Case, results: Results) -> str:
  """The results of a case for people: one line a variant, one line a bar."""
  first = next(iter(results))
  width = max(map(len, results))
  heads = f"seconds    x {first[:8]:8}  x floor  tokens/s  GB moved   temp MiB  compile s"
  lines = [f"{case.name}\n  {'':{width}}     {heads}"]
  for name, result in results.items():
    timed = f"{'':43}"
    if case.timed:
      timed = f"{result.median:12.4g} {ratio(results, name, first):10.3f} {over_floor(results, name, first):10.3f}"
      timed += f" {result.tokens_per_second:9.4g}"
    moved = f"{result.variant.moved / 1e9:9.3g}" if result.variant.moved else f"{'-':>9}"
    mfu = f"  MFU {result.mfu:.1%}" if result.mfu == result.mfu else ""
    rest = f"{moved} {result.temp_bytes / 2**20:10.1f} {result.compile_seconds:10.1f}{mfu}"
    lines.append(f"  {name:{width}} {timed} {rest}")
  for bar in case.bars:
    value = bar.value(results)
    word, sign = ("met" if _met(bar, value) else "MISSED"), ("<=" if bar.at_most else ">=")
    lines.append(f"  {word}: {bar.what}: {value:.4g} (bar {sign} {bar.limit:g})")
  return "\n".join(lines)


def record(case: Case, results: Results) -> dict[str, Any]:
  """The same for a JSON file; what is unknown is None."""
  first = next(iter(results))
  known = lambda value: value if value == value else None
  variants = {
    name: dict(
      seconds=result.seconds,
      median=known(result.median),
      ratio=ratio(results, name, first) if case.timed else None,
      over_floor=known(over_floor(results, name, first)) if case.timed else None,
      mfu=known(result.mfu),
      flops=result.variant.flops,
      moved=result.variant.moved,
      xla_flops=result.xla_flops,
      xla_bytes=result.xla_bytes,
      tokens=result.variant.tokens,
      temp_bytes=result.temp_bytes,
      compile_seconds=result.compile_seconds,
    )
    for name, result in results.items()
  }
  values = {bar.what: (bar, bar.value(results)) for bar in case.bars}
  bars = {what: dict(value=value, bar=bar.limit, met=_met(bar, value)) for what, (bar, value) in values.items()}
  return dict(reference=first, variants=variants, bars=bars)


MORE_BYTES = 1.02
"""Temporaries may grow by this factor before it is said: compiler versions differ by as much."""


def against(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
  """What has become of a case since an earlier `record` of it: one line a variant.

  Times are ratios to the case's first variant, of which the seconds themselves are told: no ratio shows whether it has
  changed, and those of two runs are not compared. A variant is called slower or faster if every round's ratio is above,
  or below, every one of the earlier rounds: by chance that is one case in 126 with five rounds each. Temporary bytes do
  not vary from run to run.
  """
  lines = [f"  since then: x {now['reference']}, temporary bytes"]
  for name, new in now["variants"].items():
    if (old := before["variants"].get(name)) is None:
      lines.append(f"    {name}: was not measured")
      continue
    rounds = [_in_rounds(each, name) for each in (before, now)]
    words = []
    if name == now["reference"] == before["reference"]:
      if all(rounds):
        words.append(" -> ".join(f"{statistics.median(each['seconds']):.4g}" for each in (old, new)) + " s")
    elif all(rounds) and before["reference"] == now["reference"]:
      low, high = min(rounds[1]) > max(rounds[0]), max(rounds[1]) < min(rounds[0])
      words.append(f"{statistics.median(rounds[0]):.3f} -> {statistics.median(rounds[1]):.3f}")
      words += ["SLOWER"] * low + ["faster"] * high
    bytes_ = [each["temp_bytes"] for each in (old, new)]
    words.append(f"{bytes_[0] / 2**20:.1f} -> {bytes_[1] / 2**20:.1f} MiB")
    words += ["MORE MEMORY"] * (bytes_[1] > MORE_BYTES * bytes_[0])
    lines.append(f"    {name}: {', '.join(words)}")
  return "\n".join(lines)


def _in_rounds(kept: Mapping[str, Any], name: str) -> list[float]:
  variants = kept["variants"]
  return [a / b for a, b in zip(variants[name]["seconds"], variants[kept["reference"]]["seconds"], strict=True)]


def _met(bar: Bar, value: float) -> bool:
  return value <= bar.limit if bar.at_most else value >= bar.limit


def hardware() -> dict[str, Any]:
  """What it ran on."""
  device, cpuinfo = jax.devices()[0], pathlib.Path("/proc/cpuinfo")
  lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
  models = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
  clock_of = "CPU seconds" if jax.default_backend() == "cpu" else "wall seconds"
  return dict(
    cpu=sorted(models) or [platform.processor()], device=device.device_kind, platform=device.platform, clock=clock_of
  )
