"""Eight virtual CPU devices for every test. The flags must stand before jax is first used.

A collective of eight devices on a busy core can take longer than XLA's default patience, which ends in an abort.
"""

import os

os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
  ]
)
