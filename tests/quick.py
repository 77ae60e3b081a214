"""XLA flags under which programs that run for milliseconds do not compile for seconds.

Every test has them but those of killed programs (`training/harness.py`), which run as XLA compiles them by default.
"""

import importlib.metadata
import os

EMITTERS = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11)
"""Whether XLA still has its older code generator, which takes a third of the time. Unknown flags end the process."""

FLAGS = " ".join(
  [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",  # one thread gains nothing by splitting a program for several
    *["--xla_cpu_use_fusion_emitters=false"] * EMITTERS,
  ]
)


def environment(**more: str) -> dict[str, str]:
  """For a command in a process of its own, on one CPU device."""
  return dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=FLAGS) | more
