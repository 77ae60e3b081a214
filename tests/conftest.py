"""Eight virtual CPU devices for every test, and quick compilation. The flags must stand before jax is first used.

A collective of eight devices on a busy core can take longer than XLA's default patience, which ends in an abort.
"""

import gc
import os

from tests.quick import FLAGS

os.environ["XLA_FLAGS"] = " ".join(
  [
    FLAGS,
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    os.environ.get("XLA_FLAGS", ""),
  ]
)
gc.set_threshold(100_000, 20, 20)  # tracing makes many objects that stay: looking for garbage took a sixth of the time

LONGEST = (
  *("training/kill_test", "model/rollout_test", "model/serial_test", "mesh_numbers_test", "training/processes_test"),
  *("model/generate_test", "carried_test", "model/halting_test", "experiment_test", "objectives/variates_test"),
)
"""Files that take minutes. They start first, lest one worker ends alone with one of them; the rest fill up."""


def pytest_collection_modifyitems(items):
  """Whole files in the order in which they start."""
  place = {f"tests/{name}.py": number for number, name in enumerate(LONGEST)}
  items.sort(key=lambda item: place.get(item.nodeid.split("::")[0], len(place)))
