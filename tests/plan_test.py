"""The plan command with libtpu, on the smallest pod there is; without it, what the command says."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.slow import leaving
from thinking_lm import errors
from thinking_lm.analysis import budgets, chips, pods

ROOT = pathlib.Path(__file__).parents[1]
HAVE = importlib.util.find_spec("libtpu") is not None
SMALL = ["--config.model.layers=2", "--config.model.width=256", "--config.model.mlp_width=512", "--config.mesh.fsdp=4"]


def run(*arguments):
  env = os.environ | dict(JAX_PLATFORMS="cpu", XLA_FLAGS="")
  command = [sys.executable, "-m", "thinking_lm.plan", *arguments]
  return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=600)


@pytest.mark.skipif(not HAVE, reason="needs libtpu, the TPU compiler: run `make plan`'s environment")
def test_a_small_pod_is_planned_and_a_batch_that_does_not_fit_is_told(tmp_path):
  file = tmp_path / "plan.json"
  small = ["--config=configs/pod/v5e_1b.py:none", "--topology=v5e:2x2", "--parts=train", *SMALL]
  done = run(*small, "--config.train.batch_size=4", f"--json={file}")
  assert done.returncode == 0, done.stderr
  found = json.loads(file.read_text())
  assert found["parts"]["train"]["fits"] and found["parts"]["train"]["collectives"]["all-gather"]["bytes"] > 0
  large = run(*small, "--config.train.batch_size=4096", "--config.model.remat=none")
  assert large.returncode == 1 and "train needs" in large.stderr and large.stderr.count("\n") == 1


@pytest.mark.skipif(not HAVE, reason="needs libtpu, the TPU compiler: run `make plan`'s environment")
def test_the_kernels_of_attention_compile_for_a_split_model():
  split = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.train.batch_size=4"]
  small = ["--config=configs/pod/v5e_1b.py:none", "--topology=v5e:2x2", "--parts=train", *SMALL]
  done = run(*small, *split, "--config.model.attention=splash")
  assert done.returncode == 0, done.stderr


def test_a_topology_that_no_pod_has_is_told_in_one_line():
  for name in ("v5p-1024", "v5e:16", "h100:8", "h100:2x2x2", "v9:2x2"):
    with pytest.raises(errors.ConfigError, match="v5e:16x16"):
      chips.pod(name)
  done = run("--config=configs/pod/v5e_1b.py")
  assert done.returncode == 64 and "--topology" in done.stderr


def test_hosts_of_gpus_are_joined_as_slices_are():
  assert chips.islands("v5e:4x4", 3) == 3 and chips.islands("h100:2x8", 1) == 2


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is not None, reason="the GPU compiler is installed")
def test_without_the_gpu_compiler_the_command_names_it():
  done = run("--config=configs/pod/v5e_1b.py", "--topology=h100:2x8")
  assert done.returncode == 78 and done.stderr.count("\n") == 1
  assert "pip install jax-cuda13-plugin==" in done.stderr


@pytest.mark.skipif(HAVE, reason="libtpu is installed")
def test_without_libtpu_the_command_says_where_it_is_to_be_had():
  with pytest.raises(errors.ConfigError, match="make plan"):
    chips.pod("v5e:2x2")


@pytest.mark.parametrize(
  "text,words",
  leaving([("{", "cannot be read"), ('{"gone:none": {}}', "names gone.py, which is not")], [("{", "cannot be read")]),
)
def test_a_budget_file_that_cannot_be_used_is_told_in_one_line(tmp_path, text, words):
  path = tmp_path / "budgets.json"
  path.write_text(text)
  done = run(f"--budgets={path}")
  assert done.returncode == 64 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_budget_files_name_every_pod_and_recipe():
  entries, small = (json.loads((ROOT / f"configs/pod/{name}.json").read_text()) for name in ("budgets", "small"))
  files = {path.stem for path in (ROOT / "configs/pod").glob("*.py")} - {name.split(":")[0] for name in small}
  assert sorted(entries) == sorted(f"{file}:{recipe}" for file in files for recipe in ("none", "latent", "hybrid"))
  assert all(entry["budget"].keys() == set(entry["parts"]) for entry in (entries | small).values())
  assert not [
    line for name, entry in (entries | small).items() for line in budgets.entry_faults(name, entry, pods.PARTS)
  ]


@pytest.mark.parametrize(
  "change, words",
  [
    (3, "an object with a topology"),
    (dict(parts=["training"]), "parts must be some of train, generate, evaluate, got ['training']"),
    (dict(parts=[["train"]]), "parts must be some of"),
    (dict(slices="2"), "slices must be a number"),
    (dict(budget=dict(train=dict(peak_gib="x", collectives={}))), "the budget of train has no peak_gib"),
    (dict(budget=dict(train=dict(peak_gib=1.0, collectives={"all-gather": 3}))), "the budget of train"),
  ],
)
def test_a_damaged_entry_of_a_budget_file_is_told(change, words):
  entry = dict(topology="v5e:2x2", parts=["train"])
  (line,) = budgets.entry_faults("pod", entry | change if isinstance(change, dict) else change, pods.PARTS)
  assert line.startswith("pod: ") and words in line


def test_options_that_say_nothing_together_are_refused():
  one = ["--config=configs/pod/v5e_1b.py:none", "--topology=v5e:2x2"]
  for flags, words in (
    ([*one, "--only=none"], "--only needs --budgets"),
    ([*one, "--budgets=configs/pod/small.json"], "--config does not go with --budgets"),
    ([*one, "--parts="], "unknown part ''"),
  ):
    done = run(*flags)
    assert done.returncode == 64 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
