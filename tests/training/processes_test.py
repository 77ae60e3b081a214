"""Several processes of one job, each a real one that finds the others as under a cluster's launcher (here: Slurm's)."""

import json
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from tests import quick
from tests.slow import leaving
from tests.training.harness import ROOT
from thinking_lm.training import checkpoint
from thinking_lm.training.writers import read_rows

FLAGS = (
  "--config=configs/word_problem.py:hybrid",
  "--config.train.steps=4",
  "--config.train.batch_size=8",
  "--config.train.log_every=1",
  "--config.train.tensorboard=False",
  "--config.optimizer.warmup_steps=2",
  "--config.checkpoint.every=2",
  "--config.data.task.length=4",
  "--config.data.task.eval_examples=21",
  "--config.model.width=16",
  "--config.evaluation.every=3",
  "--config.health.every=0",
  "--config.mesh.fsdp=2",
)


def start(count: int, devices: int, workdir, flags_of=lambda process: (), command="train"):
  """Runs a job of so many processes with so many devices each to its end: [(exit code, stdout, stderr)]."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  jobs = []
  for process in range(count):
    flags = [f"--workdir={workdir}", *flags_of(process)]
    flags = [*FLAGS, *flags] if command == "train" else flags
    environment = quick.environment(XLA_FLAGS=f"{quick.FLAGS} --xla_force_host_platform_device_count={devices}")
    if count > 1:
      flags.append("--config.train.distributed=True" if command == "train" else "--distributed")
      environment |= dict(JAX_COORDINATOR_PORT=str(port), SLURM_JOB_ID="1", SLURM_STEP_NODELIST="localhost")
      environment |= dict(SLURM_NTASKS=str(count), SLURM_PROCID=str(process), SLURM_LOCALID=str(process))
    line = [sys.executable, "-m", f"thinking_lm.{command}", *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    jobs.append(subprocess.Popen(line, cwd=ROOT, env=environment, **pipes))
  try:
    return [(job.returncode, *out) for job in jobs for out in [job.communicate(timeout=300)]]
  finally:
    for job in jobs:
      job.kill()
      job.wait()


def last_state(workdir):
  """name -> array of the last checkpoint."""
  step, _ = checkpoint.survey(checkpoint.epath.Path(workdir / "checkpoints"))
  directory = checkpoint.epath.Path(workdir / "checkpoints" / str(step))
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  schema = checkpoint.verify(directory)["schema"]
  leaves = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, (shape, dtype) in schema.items()}
  return step, jax.device_get(ocp.load(directory / checkpoint.ARRAYS, leaves))


def numbers(workdir):
  """The rows of a run without what depends on the clock."""
  timed = ("_per_second", "wait_", "time", "seconds", "attempt")
  rows = read_rows(workdir / "metrics.jsonl")
  return [{name: value for name, value in row.items() if not any(part in name for part in timed)} for row in rows]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """The work directory of one process with four devices."""
  workdir = tmp_path_factory.mktemp("alone")
  ended = start(1, 4, workdir)
  assert [code for code, *_ in ended] == [0], ended
  return workdir


ACROSS = dict(
  rows=[],
  tensor=["--config.mesh.fsdp=1", "--config.mesh.tensor=4", "--config.model.heads=4"],
  sequence=["--config.mesh.fsdp=1", "--config.mesh.sequence=4"],
  rows_and_tensor=["--config.mesh.fsdp=2", "--config.mesh.tensor=2"],
)
"""What the four devices split: rows, or what lies across rows, so that processes share these."""


CASES = [(2, "rows"), (2, "tensor")]
MORE = [(4, "rows"), (2, "sequence"), (4, "rows_and_tensor")]


@pytest.mark.parametrize("count, across", leaving([*CASES, *MORE], MORE))
def test_processes_train_and_evaluate_as_one_process_with_as_many_devices(alone, tmp_path, count, across):
  together = tmp_path / "together"
  ended = start(count, 4 // count, together, lambda process: ACROSS[across])
  assert [code for code, *_ in ended] == [0] * count, ended
  (step, expected), (last, got) = map(last_state, (alone, together))
  assert (step, last) == (4, 4)
  for name, leaf in expected.items():
    np.testing.assert_allclose(got[name], leaf, rtol=1e-5, atol=1e-7, err_msg=name)
  rows = numbers(together)
  assert [row["step"] for row in rows if "validation_nll" in row] == [3, 4]
  for row, other in zip(rows, numbers(alone), strict=True):
    assert row == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_processes_with_other_configs_refuse_to_start_and_say_why(tmp_path):
  ended = start(2, 1, tmp_path / "run", lambda process: [f"--config.train.seed={process}", "--config.mesh.fsdp=1"])
  for process, (code, _, errors) in enumerate(ended):
    assert code == 78, errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in errors
    assert f"config.train.seed differs between process 0 and 1: here, on process {process}, it is {process}" in lines[0]
  assert not (tmp_path / "run").exists()


def test_processes_evaluate_and_generate_as_one_process_with_as_many_devices(tmp_path):
  """Of a task that asks for text: its answers are generated too."""
  run = tmp_path / "run"
  ended = start(1, 4, run, lambda process: ["--config.data.task.name=last_letter", "--config.data.task.length=2"])
  assert [code for code, *_ in ended] == [0], ended
  table, drawn = [], []
  options = ["--samples=1,2", "--controls=shuffled", "--limit=9"]
  prompts = ["--prompt=ab", "--prompt=c", "--max_tokens=6", f"--output={tmp_path}/drawn"]
  for count in (1, 2):
    found = start(count, 4 // count, run, lambda process: options, command="evaluate")
    assert [code for code, *_ in found] == [0] * count, found
    assert ["written: " in out for _, out, _ in found] == [True] + [False] * (count - 1)
    (file,) = (run / "evaluation").glob("*.json")
    table.append({name: value for name, value in json.loads(file.read_text()).items() if name not in CLOCKED})
    file.unlink()
    found = start(count, 4 // count, run, lambda process: prompts, command="generate")
    assert [code for code, *_ in found] == [0] * count, found
    drawn.append([json.loads(line) for line in (tmp_path / "drawn").read_text().splitlines()])
  one, two = (dict(leaves(each)) for each in table)
  assert one.keys() == two.keys() and any("generated" in name for name in one)
  for name, value in one.items():
    assert two[name] == (pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value), name
  assert [row["tokens"] for row in drawn[0]] == [row["tokens"] for row in drawn[1]]


@pytest.mark.slow
def test_processes_with_other_prompts_refuse_and_a_proxy_is_read_by_all(tmp_path):
  text = ["--config.data.task.name=last_letter", "--config.data.task.length=2"]
  assert [code for code, *_ in start(1, 2, tmp_path / "proxy", lambda process: text)] == [0]
  for code, _, errors in start(2, 1, tmp_path / "proxy", lambda process: [f"--prompt=a{process}"], command="generate"):
    assert code == 78 and "the command line differs between process 0 and 1" in errors, errors
  needs = ["--config.thought.placement=entropy", "--config.thought.need_above=0.1", "--config.thought.room=4"]
  by_proxy = [*text, *needs, f"--config.thought.proxy={tmp_path}/proxy"]
  ended = start(2, 1, tmp_path / "run", lambda process: by_proxy)
  assert [code for code, *_ in ended] == [0, 0], ended


CLOCKED = ("seconds", "written", "code", "command")


def leaves(tree, path=""):
  """(path, leaf) of nested JSON."""
  items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
  if items is None:
    yield path, tree
  else:
    for name, value in items:
      yield from leaves(value, f"{path}/{name}")
