"""A run that starts with the parameters of another one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training import toy
from thinking_lm.errors import ConfigError, DataError
from thinking_lm.training import loop, warm
from thinking_lm.training import state as state_lib


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """(work directory, parameters) of a finished run."""
  path = tmp_path_factory.mktemp("source")
  return str(path), jax.device_get(loop.train(toy.make_run(steps=2), str(path)).params)


def with_head(init):
  return lambda key: init(key) | dict(heads=dict(value=jnp.full(toy.D, 7.0)))


def headed(**changes):
  """The toy with one parameter more, which its loss does not read."""
  run = toy.make_run(steps=2, **changes)
  axes = toy.AXES | dict(heads=dict(value=("embed",)))
  return dataclasses.replace(run, init_fn=with_head(toy.init), axes=axes, optional=("heads/",))


def equal(one, other):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), other)


def fresh(key=9):
  return jax.tree.map(jnp.asarray, toy.init(jax.random.key(key)))


def test_parameters_are_taken_by_name_and_new_heads_are_listed(source, caplog):
  path, expected = source
  equal(warm.start(path, fresh()), expected)
  started = warm.start(path, with_head(toy.init)(jax.random.key(9)), ("heads/",))
  equal(started.pop("heads"), dict(value=np.full(toy.D, 7.0)))
  equal(started, expected)
  assert "not there, and fresh: heads/value" in caplog.text


def test_heads_of_the_source_that_this_run_lacks_are_left_out(source, tmp_path, caplog):
  loop.train(headed(), str(tmp_path))
  assert warm.start(str(tmp_path), fresh(), ("heads/",)).keys() == toy.AXES.keys()
  assert "there only, and left out: heads/value" in caplog.text
  with pytest.raises(ConfigError, match=r"params/heads/value: the checkpoint has .*, the config asks for nothing"):
    warm.start(str(tmp_path), fresh())


@pytest.mark.parametrize(
  "change,message",
  [
    (lambda p: p | dict(head=jnp.zeros((toy.D, 3))), r"params/head: .*float32\[8, 16\], .*float32\[8, 3\]"),
    (lambda p: p | dict(bias=jnp.zeros(3)), r"params/bias: the checkpoint has nothing"),
    (lambda p: {name: leaf for name, leaf in p.items() if name != "head"}, r"params/head: .* asks for nothing"),
  ],
)
def test_what_does_not_fit_is_one_line(source, change, message):
  with pytest.raises(ConfigError, match=message) as caught:
    warm.start(source[0], change(fresh()), ("heads/",))
  assert len(caught.value.faults) == 2, "a title and the line"


def test_a_source_without_a_checkpoint_is_said(tmp_path):
  with pytest.raises(DataError, match=r"no checkpoint in .* to start from"):
    warm.start(str(tmp_path / "nothing"), fresh())


def test_a_run_starts_there_and_resumes_without_its_source(source, tmp_path):
  """On another mesh; what is carried starts from the same parameters, or from those of a source of its own."""
  path, expected = source
  seen = []

  class Look:
    every = 1

    def __call__(self, step, state):
      seen.append(jax.device_get((state.params, state.extra)))
      if step == 2 and len(seen) == 2:
        raise RuntimeError("out of the blue")

  def make(init_from, copy_from):
    run = toy.make_run(steps=3, every=1, mesh=dict(data=2, fsdp=2, tensor=2), train=dict(init_from=init_from))
    carry_init = lambda params: dict(copy=params, other=jax.tree.map(jnp.zeros_like, params))
    return dataclasses.replace(run, carry_init=carry_init, carry_from=dict(other=copy_from), hooks=[Look()])

  with pytest.raises(RuntimeError):
    loop.train(make(path, path), str(tmp_path / "run"))
  equal(seen[0][1]["copy"], expected)
  equal(seen[0][1]["other"], expected)
  cut = loop.train(make(path, str(tmp_path / "gone")), str(tmp_path / "run"))
  straight = loop.train(make(path, path), str(tmp_path / "straight"))
  assert state_lib.digest(cut) == state_lib.digest(straight)
  assert cut.extra["copy"]["head"].sharding == cut.params["head"].sharding
