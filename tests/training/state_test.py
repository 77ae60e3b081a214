import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.training import toy
from thinking_lm.training import state as state_lib
from thinking_lm.training.optimizer import OptimizerConfig, make_optimizer

PARAMS = ["embed", "head", "layers/down", "layers/norm", "layers/up"]


def create(name="adamw", ema=True):
  optimizer = make_optimizer(OptimizerConfig(name=name), toy.AXES)
  return jax.eval_shape(state_lib.make_init(toy.init, optimizer, ema), jax.random.key(0))


def test_the_state_holds_what_is_declared_and_nothing_else():
  """Whoever adds something that affects the future of a run must add it here, and so to the checkpoint."""
  assert [field.name for field in dataclasses.fields(state_lib.TrainState)] == [
    *("step", "params", "opt_state", "ema", "skips", "extra"),
  ]
  names = list(state_lib.named_leaves(create()))
  moments = [f"opt_state/1/{moment}/{name}" for moment in ("mu", "nu") for name in PARAMS]
  expected = ["step", *(f"params/{n}" for n in PARAMS), *(f"ema/{n}" for n in PARAMS), "opt_state/1/count", *moments]
  assert sorted(names) == sorted([*expected, "skips/consecutive", "skips/total"])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_everything_that_sums_is_float32_and_everything_that_counts_int32(name):
  for path, leaf in state_lib.named_leaves(create(name)).items():
    counts = path == "step" or path.startswith("skips") or path.endswith("count")
    assert leaf.dtype == (jnp.int32 if counts else jnp.float32), path
    assert not leaf.weak_type, path  # else the second step would be compiled anew


def test_without_average_there_is_no_copy():
  assert not any(name.startswith("ema") for name in state_lib.named_leaves(create(ema=False)))


def test_digest_sees_every_bit_name_type_and_shape():
  base = dict(a=jnp.zeros((2, 3)), b=jnp.int32(1))
  changes = [
    dict(base, a=base["a"].at[1, 2].set(-0.0)),
    dict(base, a=jnp.zeros((3, 2))),
    dict(base, b=jnp.uint32(1)),
    dict(a=base["a"], c=base["b"]),
  ]
  digests = [state_lib.digest(tree) for tree in [base, *changes]]
  assert len(set(digests)) == len(digests)
  assert state_lib.digest(jax.tree.map(jnp.copy, base)) == digests[0]


def test_keys_of_two_purposes_differ_and_are_threefry():
  init, train = (jax.random.key_data(state_lib.key(0, purpose)) for purpose in ("init", "train"))
  assert (init != train).any()
  assert str(jax.random.key_impl(state_lib.key(0, "train"))) == "threefry2x32"
