"""The dependencies that setup.py declares, the versions that the lock files pin, and the files that start first."""

import ast
import pathlib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import LONGEST

ROOT = pathlib.Path(__file__).resolve().parents[1]
LOCKED_EXTRAS = ("test", "report", "tokenizers")


def declared() -> dict:
  """The module-level literals of setup.py, without running it."""
  tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
  values = {}
  for node in tree.body:
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.Dict):
      values[node.targets[0].id] = ast.literal_eval(node.value)
  return values


def locked(python: str) -> dict[str, str]:
  """Canonical package name -> exact version of one lock file."""
  lines = (ROOT / f"requirements/lock-py{python.replace('.', '')}.txt").read_text(encoding="utf-8").splitlines()
  pins = [line.split("==") for line in lines if not line.startswith("#")]
  assert all(len(pin) == 2 for pin in pins)
  return {canonicalize_name(name): version for name, version in pins}


def test_training_needs_at_most_ten_packages():
  assert len({Requirement(line).name for line in declared()["TRAINING"]}) <= 10


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_lock_satisfies_setup(python):
  pins, lines = locked(python), declared()
  wanted = [Requirement(line) for line in sum((lines["EXTRAS"][extra] for extra in LOCKED_EXTRAS), lines["TRAINING"])]
  wanted = [need for need in wanted if need.marker is None or need.marker.evaluate({"python_version": python})]
  assert len({need.name for need in wanted}) == len(wanted) >= 10
  for need in wanted:
    assert need.specifier.contains(pins[canonicalize_name(need.name)]), need


def test_flax_and_jax_fit():
  """Flax up to 0.12.8 breaks on JAX 0.11.1 and later, which later flax needs."""
  for python in ("3.11", "3.12"):
    jax, flax = (tuple(map(int, locked(python)[name].split("."))) for name in ("jax", "flax"))
    assert (jax >= (0, 11, 1)) == (flax > (0, 12, 8)), python


def test_the_longest_test_files_are_there():
  assert [name for name in LONGEST if not (ROOT / f"tests/{name}.py").exists()] == []
