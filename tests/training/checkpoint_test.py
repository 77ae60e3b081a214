import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training import toy
from thinking_lm.errors import ConfigError, DataError, DivergedError, SaveError
from thinking_lm.training import checkpoint as checkpoint_lib
from thinking_lm.training import state as state_lib
from thinking_lm.training.checkpoint import CheckpointConfig, Checkpoints
from thinking_lm.training.mesh import MeshConfig, make_mesh
from thinking_lm.training.optimizer import OptimizerConfig, make_optimizer

OPTIMIZER = make_optimizer(OptimizerConfig(), toy.AXES)


def build(seed=0, ema=True, **sizes):
  """(A state on a mesh, what to restore it as)."""
  mesh = make_mesh(MeshConfig(**sizes))
  init = state_lib.make_init(toy.init, OPTIMIZER, ema)
  key = state_lib.key(seed, "init")
  shardings = state_lib.shardings(jax.eval_shape(init, key), toy.AXES, mesh)
  state = jax.jit(init, out_shardings=shardings)(key)
  return state, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def open_at(directory, digest="data", **config):
  return Checkpoints(directory, CheckpointConfig(**config), dict(data=digest))


@pytest.fixture(scope="module")
def built():
  return build()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, built):
  """A directory with the steps 0, 2 and 4, whose states tell their step."""
  directory = tmp_path_factory.mktemp("run") / "checkpoints"
  checkpoints = open_at(directory, keep_last=9)
  for step in (0, 2, 4):
    checkpoints.save(step, built[0].replace(step=jnp.int32(step)))
  checkpoints.wait()
  return directory


@pytest.fixture
def copy(saved, tmp_path):
  shutil.copytree(saved, tmp_path / "checkpoints")
  return tmp_path / "checkpoints"


def names(directory):
  return sorted(path.name for path in directory.iterdir())


def test_restores_what_was_saved(saved, built):
  state, abstract = built
  restored = open_at(saved).restore(abstract)
  assert state_lib.digest(restored) == state_lib.digest(state.replace(step=jnp.int32(4)))
  assert restored.params["embed"].sharding == abstract.params["embed"].sharding


def test_an_empty_directory_has_no_state(tmp_path, built):
  assert open_at(tmp_path / "new").restore(built[1]) is None


@pytest.mark.parametrize("sizes", [dict(data=1, fsdp=4, tensor=2), dict(data=2, fsdp=2, sequence=2)])
def test_restores_onto_another_mesh(saved, built, sizes):
  _, abstract = build(**sizes)
  restored = open_at(saved).restore(abstract)
  assert state_lib.digest(restored) == state_lib.digest(built[0].replace(step=jnp.int32(4)))
  assert restored.opt_state[1].mu["embed"].sharding == abstract.params["embed"].sharding
  assert abstract.params["embed"].sharding != built[1].params["embed"].sharding


def test_restores_onto_fewer_devices(saved, built):
  whole = jax.sharding.SingleDeviceSharding(jax.devices()[3])
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), built[1])
  restored = open_at(saved).restore(abstract)
  assert state_lib.digest(restored) == state_lib.digest(built[0].replace(step=jnp.int32(4)))


def test_readers_take_the_parameters_or_their_average_alone(saved, built):
  state = built[0]
  step, params = checkpoint_lib.read_params(saved, built[1].params)
  _, averaged = checkpoint_lib.read_params(saved, built[1].params, averaged=True)
  assert step == 4
  assert state_lib.digest(params) == state_lib.digest(averaged) == state_lib.digest(state.params)


def test_a_reader_without_checkpoints_is_told_to_train(tmp_path, built):
  with pytest.raises(DataError, match="train first"):
    checkpoint_lib.read_params(tmp_path, built[1].params)


def damage(path, how, rng):
  data = bytearray(path.read_bytes())
  if how == "flip" and data:
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)
  elif how == "truncate" and data:
    path.write_bytes(data[:-1])
  elif how == "delete":
    path.unlink()
  elif how == "add":
    (path.parent / "extra").write_bytes(b"")
  elif how == "link":
    target = path.parent.parent / "elsewhere"
    path.rename(target)
    path.symlink_to(target)
  else:
    return False
  return True


@pytest.mark.parametrize("how", ["flip", "truncate", "delete", "add", "link"])
def test_any_damage_to_any_file_is_seen(saved, tmp_path, how):
  rng = np.random.default_rng(0)
  files = [path.relative_to(saved) for path in sorted((saved / "4").rglob("*")) if path.is_file()]
  seen = 0
  for name in files:
    for _ in range(4 if how == "flip" else 1):
      shutil.rmtree(tmp_path / "4", ignore_errors=True)
      shutil.copytree(saved / "4", tmp_path / "4")
      if how in ("add", "link") and name.name == checkpoint_lib.MANIFEST:
        continue
      if damage(tmp_path / name, how, rng):
        seen += 1
        with pytest.raises(DataError):
          checkpoint_lib.verify(checkpoint_lib.epath.Path(tmp_path / "4"))
  assert seen >= len(files) - 2  # Orbax's commit mark is empty, and the manifest is no place for links


def test_a_damaged_step_is_moved_aside_and_the_one_before_is_taken(copy, built, caplog):
  array = next(path for path in sorted((copy / "4").rglob("d/*")) if path.is_file())
  damage(array, "flip", np.random.default_rng(0))
  checkpoints = open_at(copy)
  restored = checkpoints.restore(built[1])
  assert int(restored.step) == 2 and checkpoints.committed == 2 and checkpoints.fallbacks == 1
  aside = [name for name in names(copy) if name.startswith("4.corrupt-")]
  assert names(copy) == sorted(["0", "2", *aside]) and len(aside) == 1
  assert "CHECKPOINT 4 IS DAMAGED" in caplog.text and "going on from step 2" in caplog.text
  checkpoints.save(4, restored.replace(step=jnp.int32(4)))  # and its name is free again
  checkpoints.wait()
  assert int(open_at(copy).restore(built[1]).step) == 4


def test_a_step_without_manifest_is_none(copy, built):
  (copy / "4" / "manifest.json").unlink()
  assert int(open_at(copy).restore(built[1]).step) == 2


def test_step_zero_is_a_step(copy, built):
  for step in ("2", "4"):
    shutil.rmtree(copy / step)
  assert int(open_at(copy).restore(built[1]).step) == 0


def test_if_no_step_is_intact_nothing_begins_afresh(copy, built):
  for step in ("0", "2", "4"):
    damage(copy / step / "manifest.json", "flip", np.random.default_rng(0))
  for _ in range(2):  # the second start says the same
    with pytest.raises(DataError) as error:
      open_at(copy).restore(built[1])
    assert all(f"step {step}: " in str(error.value) for step in (0, 2, 4))
    assert names(copy) == ["0", "2", "4"]


def test_if_only_steps_moved_aside_are_left_nothing_begins_afresh(copy, built):
  for step in ("0", "2"):
    shutil.rmtree(copy / step)
  (copy / "4").rename(copy / "4.corrupt-then")
  with pytest.raises(DataError, match=r"4\.corrupt-then: moved aside earlier"):
    open_at(copy).restore(built[1])


def test_a_checkpoint_of_another_model_lists_the_differences(saved):
  def init(key):
    params = toy.init(key)
    return dict(params, head=params["head"][:, :3], embed=params["embed"].astype(jnp.bfloat16), more=jnp.zeros(2))

  abstract = jax.eval_shape(state_lib.make_init(init, optax.identity(), False), jax.random.key(0))
  with pytest.raises(ConfigError) as error:
    open_at(saved).restore(abstract)
  text = str(error.value)
  assert "params/head: the checkpoint has float32[8, 16], the config asks for float32[8, 3]" in text
  assert "params/embed: the checkpoint has float32[16, 8], the config asks for bfloat16[16, 8]" in text
  assert "params/more: the checkpoint has nothing, the config asks for float32[2]" in text
  assert "ema/head: the checkpoint has float32[8, 16], the config asks for nothing" in text
  assert "params/layers" not in text


def test_a_checkpoint_of_other_data_is_refused(saved, built):
  with pytest.raises(ConfigError, match="'data', now it is 'other'"):
    open_at(saved, digest="other").restore(built[1])


def test_keeps_the_last_and_every_so_many(tmp_path, built):
  checkpoints = open_at(tmp_path, keep_last=2, keep_every=3)
  (tmp_path / "7_backup").mkdir()
  (tmp_path / "8").mkdir()
  (tmp_path / "8" / "notes").write_text("not ours")
  for step in range(1, 7):
    checkpoints.save(step, built[0])
  checkpoints.wait()
  assert names(tmp_path) == ["3", "5", "6", "7_backup", "8"]


@pytest.mark.parametrize("left", ["nothing", "mark", "arrays", "deleting"])
def test_remains_of_an_interrupted_save_or_deletion_go(copy, built, left):
  step = copy / "6"
  if left == "deleting":
    shutil.copytree(copy / "4", step)
    (step / "manifest.json").unlink()
  step.mkdir(exist_ok=True)
  if left != "nothing":
    (step / "unfinished").write_text("")
  if left == "arrays":
    (step / "arrays.orbax-checkpoint-tmp").mkdir()
    (step / "arrays.orbax-checkpoint-tmp" / "x").write_text("")
    (step / ".manifest.json.new").write_text("{")
  assert int(open_at(copy).restore(built[1]).step) == 4
  assert names(copy) == ["0", "2", "4"]


def test_a_mark_beside_a_good_manifest_means_nothing(copy, built):
  (copy / "4" / "unfinished").write_text("")
  assert int(open_at(copy).restore(built[1]).step) == 4


def test_a_save_that_fails_is_raised_at_the_next_step(tmp_path, built, monkeypatch):
  checkpoints = open_at(tmp_path)
  checkpoints.save(1, built[0])
  checkpoints.wait()

  def full(path, text):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(checkpoint_lib.storage, "write_atomic", full)
  checkpoints.save(2, built[0])
  checkpoints._saving[1].exception(timeout=60)  # the background part is over; nobody has looked yet
  with pytest.raises(SaveError, match=r"2 failed: .*No space left.*last good step is 1"):
    checkpoints.check()
  monkeypatch.undo()
  again = open_at(tmp_path)
  assert again.restore(built[1]) is not None and again.committed == 1


def test_a_save_that_cannot_start_is_an_error(tmp_path, built):
  (tmp_path / "1").write_text("a file in the way")
  with pytest.raises(SaveError, match="in the way"):
    open_at(tmp_path).save(1, built[0])


def test_parameters_that_are_not_finite_are_never_saved(tmp_path, built):
  bad = built[0].replace(params=dict(built[0].params, embed=built[0].params["embed"].at[0, 0].set(jnp.nan)))
  with pytest.raises(DivergedError, match="not finite"):
    open_at(tmp_path).save(1, bad)
  assert names(tmp_path) == []


def test_arrays_are_copied_before_save_returns(tmp_path):
  # The next step overwrites the buffers of the state, while the save is still writing.
  mutate = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 0 - 1, x), donate_argnums=0)
  state = dict(w=jnp.arange(1 << 20, dtype=jnp.float32))
  struct = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  checkpoints = open_at(tmp_path)
  checkpoints.save(1, Params(state))
  state = mutate(state)
  checkpoints.wait()
  restored = checkpoint_lib.load(checkpoint_lib.epath.Path(tmp_path / "1"), struct, "params/")
  np.testing.assert_array_equal(restored["w"], np.arange(1 << 20, dtype=np.float32))
  assert float(state["w"][5]) == -1


@jax.tree_util.register_pytree_with_keys_class
class Params:
  """The least that can be saved."""

  def __init__(self, params):
    self.params = params

  def tree_flatten_with_keys(self):
    return [(jax.tree_util.GetAttrKey("params"), self.params)], None

  @classmethod
  def tree_unflatten(cls, _, children):
    return cls(*children)


def test_the_manifest_says_what_is_there(saved, built):
  manifest = json.loads((saved / "4" / "manifest.json").read_text())
  assert manifest["step"] == 4 and manifest["identity"] == dict(data="data")
  assert manifest["schema"] == {n: [list(x.shape), str(x.dtype)] for n, x in state_lib.named_leaves(built[0]).items()}
  files = {str(p.relative_to(saved / "4")) for p in pathlib.Path(saved / "4" / "arrays").rglob("*") if p.is_file()}
  assert manifest["files"].keys() == files
  assert all(size == os.path.getsize(saved / "4" / name) for name, (size, _) in manifest["files"].items())
