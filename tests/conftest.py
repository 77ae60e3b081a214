"""Eight virtual CPU devices for every test. The flag must stand before jax is first used."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
