"""XLA flags under which programs that run for milliseconds do not compile for seconds.

Every test has them but those of killed programs (`training/harness.py`), which run as XLA compiles them by default.
"""

import importlib.metadata
import os
import pathlib
import subprocess
import sys

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


def command(module: str, *arguments: str) -> tuple[int, str, str]:
  """(exit code, stdout, stderr) of a command of thinking_lm in a process of its own."""
  line = [sys.executable, "-m", f"thinking_lm.{module}", *arguments]
  root = pathlib.Path(__file__).resolve().parents[1]
  done = subprocess.run(line, cwd=root, env=environment(), capture_output=True, text=True, timeout=300, check=False)
  return done.returncode, done.stdout, done.stderr
