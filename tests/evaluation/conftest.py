import jax
import pytest

from tests.evaluation.harness import train


@pytest.fixture(scope="package", autouse=True)
def quick():
  """Compiling is most of the time here, and nothing is asked of speed."""
  name = "jax_disable_most_optimizations"
  before = jax.config.read(name)
  jax.config.update(name, True)
  yield
  jax.config.update(name, before)


@pytest.fixture(scope="package")
def trained(quick, tmp_path_factory):
  """(Work directory of a tiny run, its last state, its rows)."""
  path = tmp_path_factory.mktemp("evaluation") / "run"
  return path, *train(path, every=0)
