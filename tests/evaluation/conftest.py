import pytest

from tests.evaluation.harness import train


@pytest.fixture(scope="package")
def trained(tmp_path_factory):
  """(Work directory of a tiny run, its last state, its rows)."""
  path = tmp_path_factory.mktemp("evaluation") / "run"
  return path, *train(path, every=0)
