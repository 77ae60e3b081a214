"""The suites of `python -m thinking_lm.bench`. A new one is a function that gives its cases, and a line here."""

from thinking_lm.analysis import (
  bench_accelerator,
  bench_checkpoint,
  bench_chip,
  bench_data,
  bench_decode,
  bench_halting,
  bench_persistent,
  bench_plain,
  bench_private,
  bench_quiet,
)

SUITES = dict(
  accelerator=bench_accelerator.cases,
  checkpoint=bench_checkpoint.cases,
  chip=bench_chip.cases,
  data=bench_data.cases,
  decode=bench_decode.cases,
  halting=bench_halting.cases,
  persistent=bench_persistent.cases,
  plain=bench_plain.cases,
  private=bench_private.cases,
  quiet_star=bench_quiet.cases,
)
