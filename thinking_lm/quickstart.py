"""The main job at the smallest size: what thinking bought and what it cost, beside models that do not think.

  python -m thinking_lm.quickstart [--workdir=runs/quickstart] [--parts=text,word_problem] [--seeds=1]

text: a byte-level decoder on the embedded corpus, without thoughts, without thoughts for as many FLOPs as thinking,
and with latent thoughts. word_problem: the running product of S3 elements with one layer: without thoughts, with pause
thoughts, with latent thoughts. Every arm is an ordinary run of `thinking_lm.train` in a work directory of its own; a
second call goes on from what is there. Ends with a table, a sample with its thoughts, a plot, and where the files are.
"""

import dataclasses
import json
import pathlib
import runpy
import sys
import time
from collections.abc import Mapping
from typing import Any

from absl import flags

from thinking_lm import errors
from thinking_lm.errors import UsageError

_WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Where the arms' work directories go.")
_PARTS = flags.DEFINE_list("parts", ["text", "word_problem"], "What to run.")
_SEEDS = flags.DEFINE_integer("seeds", 1, "Seeds of each arm.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 0, "Steps of each arm; 0: as in its config file.", lower_bound=0)

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"


@dataclasses.dataclass(frozen=True)
class Arm:
  """One model of a comparison. equal_flops: trained until it has cost as much as the part's last arm."""

  name: str
  recipe: str
  equal_flops: bool = False


PARTS = dict(
  text=(Arm("none", "none"), Arm("none, equal FLOPs", "none", equal_flops=True), Arm("latent", "latent")),
  word_problem=(Arm("none", "none"), Arm("pause", "pause"), Arm("latent", "latent")),
)


def load_config(part: str, recipe: str):
  """The ConfigDict of configs/PART.py:RECIPE; the file is ours, and a config file is a program."""
  file = CONFIGS / f"{part}.py"
  if not file.exists():
    raise UsageError(f"{file} is missing: the quickstart runs in a checkout of the repository")
  return runpy.run_path(str(file))["get_config"](recipe)


def configure(part: str, arm: Arm, seed: int):
  """(ExperimentConfig of an arm, its training FLOPs for one step)."""
  from thinking_lm import experiment
  from thinking_lm.analysis.training import training_flops

  def one(recipe):
    values = load_config(part, recipe)
    values.train.seed = values.data.seed = seed
    if _STEPS.value:
      values.train.steps = _STEPS.value
      values.optimizer.warmup_steps = min(values.optimizer.warmup_steps, _STEPS.value // 4)
    config = experiment.parse(values)
    built = experiment.build(config)
    return values, built, training_flops(config, built.data.vocabulary.size, built.data.sequence_length)

  values, built, flops = one(arm.recipe)
  if arm.equal_flops:
    _, _, most = one(PARTS[part][-1].recipe)
    values.train.steps = round(values.train.steps * most / flops)
    built = experiment.build(experiment.parse(values))
  return built, flops


def run(part: str, arm: Arm, seed: int, directory: pathlib.Path) -> dict[str, Any]:
  """Trains and evaluates one arm, or reads what an earlier call found. Returns a row of the table."""
  from thinking_lm.analysis.traffic import training_traffic
  from thinking_lm.evaluation import evaluators, summary
  from thinking_lm.evaluation.progress import Progress
  from thinking_lm.training import loop, state, storage, workdir

  result = directory / "result.json"
  built, flops = configure(part, arm, seed)
  steps, job = built.config.train.steps, built.run()
  made_by = storage.sha256(storage.canonical(dict(config=job.resolved_config, code=workdir.code_version()["source"])))
  if result.exists():
    row = json.loads(result.read_text())
    if row["made_by"] == made_by:
      return row
  began, resumed = time.monotonic(), (directory / "status.json").exists()
  params = loop.train(job, str(directory)).params
  seconds = None if resumed else time.monotonic() - began
  key = state.key(seed, "evaluate")
  found = evaluators.evaluate(built, params, "test", key=key, batch_size=64, progress=Progress())
  task = built.data.task
  parameters = built.model.size
  moved = training_traffic(built.config, built.data.vocabulary.size, built.data.sequence_length, parameters).total
  values = summary.summarise(found, tagging=task is not None, task=task is not None)
  row = dict(
    made_by=made_by,
    arm=arm.name,
    seed=seed,
    steps=steps,
    parameters=parameters,
    flops=flops * steps,
    moved=moved * steps,
    seconds=seconds,
    think_per_real=values["think_tokens"] / values["real_tokens"],
    **{name: values["arms"][values["reference"]][name] for name in ("bits_per_byte", "accuracy")},
    without={name: arm["minus_reference"] for name, arm in values["arms"].items() if name != values["reference"]},
  )
  storage.write_atomic(result, json.dumps(row, indent=2) + "\n")
  return row


def table(part: str, rows: list[Mapping[str, Any]]) -> str:
  """What each arm reached on the test split and what it cost: one line for each seed, intervals over test rows, and no
  seconds where a run was resumed.
  """
  from thinking_lm.evaluation import summary

  measure = "accuracy" if part == "word_problem" else "bits_per_byte"
  base = rows[0]
  lines = [("arm", "seed", measure, "parameters", "steps", "think/real", "FLOPs", "x none", "bytes", "seconds")]
  for row in rows:
    cost = (
      f"{row['flops']:.2e}",
      f"{row['flops'] / base['flops']:.2f}",
      f"{row['moved']:.2e}",
      "-" if row["seconds"] is None else f"{row['seconds']:.0f}",
    )
    size = (f"{row['parameters']:,}", str(row["steps"]), f"{row['think_per_real']:.3f}")
    lines.append((row["arm"], str(row["seed"]), summary.text(row[measure]), *size, *cost))
  notes = []
  for row in rows:
    if row["without"]:
      costs = ", ".join(f"{name} {summary.text(value)}" for name, value in row["without"].items())
      notes.append(f"{row['arm']}, seed {row['seed']}: nats per token lost with other thoughts in place: {costs}")
  return "\n".join([f"{part}, test split", summary.aligned(lines), *notes])


def plot(parts: Mapping[str, list], root: pathlib.Path) -> pathlib.Path | None:
  """Loss against steps and against FLOPs, one line for each arm and seed; None where matplotlib is missing."""
  try:
    import matplotlib
  except ImportError:
    return None
  matplotlib.use("Agg")
  from matplotlib import pyplot

  from thinking_lm.training.writers import read_rows

  figure, axes = pyplot.subplots(len(parts), 2, figsize=(11, 4 * len(parts)), squeeze=False)
  for (part, rows), (left, right) in zip(parts.items(), axes, strict=True):
    for row in rows:
      curve = [r for r in read_rows(root / part / slug(row) / "metrics.jsonl") if "nll" in r]
      steps, nll = [r["step"] for r in curve], [r["nll"] for r in curve]
      left.plot(steps, nll, label=f"{row['arm']}, seed {row['seed']}")
      right.plot([step * row["flops"] / row["steps"] for step in steps], nll)
    left.set(title=part, xlabel="step", ylabel="training loss, nats per token")
    right.set(xlabel="training FLOPs")
    left.legend(fontsize=8)
  figure.tight_layout()
  file = root / "quickstart.png"
  figure.savefig(file, dpi=120)
  pyplot.close(figure)
  return file


def slug(row: Mapping[str, Any]) -> str:
  """Directory name of an arm and seed."""
  return f"{row['arm']}-{row['seed']}".replace(", ", "-").replace(" ", "-")


def sample(directory: pathlib.Path) -> str:
  """A continuation by a trained text model, with its thoughts."""
  from thinking_lm import experiment
  from thinking_lm.evaluation import display
  from thinking_lm.model.generate import Sampling
  from thinking_lm.training import state

  subject, params, _ = experiment.load(str(directory), rows=False)
  prompt = b"The statement "
  made = subject.generate(params, [prompt], state.key(0, "generate"), Sampling(160, temperature=0.7))
  text = display.continuation(subject.data.tokenizer, made, 0, thoughts=True, colour=sys.stdout.isatty())
  return f"{prompt.decode()}{text}"


def _check() -> None:
  """Raises UsageError where the command line names what is not there."""
  if not _WORKDIR.value:
    raise UsageError("--workdir is empty; give a directory, or leave it out")
  parts = _PARTS.value
  strange = next((part for part in parts if part not in PARTS), None)
  if strange is not None or not parts or len(set(parts)) < len(parts):
    raise UsageError(f"--parts takes each of {', '.join(PARTS)} once, got {','.join(parts)!r}")


def main(argv) -> None:
  """Runs the parts one after the other."""
  del argv
  began = time.monotonic()
  _check()
  root = pathlib.Path(_WORKDIR.value).resolve()
  jobs = [(part, arm, seed) for part in _PARTS.value for arm in PARTS[part] for seed in range(_SEEDS.value)]
  parts: dict[str, list] = {}
  for number, (part, arm, seed) in enumerate(jobs, start=1):
    print(f"\n[{number}/{len(jobs)}] {part}: {arm.name}, seed {seed}", flush=True)
    directory = root / part / slug(dict(arm=arm.name, seed=seed))
    parts.setdefault(part, []).append(run(part, arm, seed, directory))
  figure = plot(parts, root)
  for part, rows in parts.items():
    print(f"\n{table(part, rows)}")
  if "text" in parts:
    thinker = root / "text" / slug(parts["text"][-1])
    print(f"\nA sample; each thought stands in brackets before the byte it led to:\n\n{sample(thinker)}")
    print(f"\nMore: python -m thinking_lm.generate --workdir={thinker} --prompt='The ' --thoughts=shown")
    print(f"      python -m thinking_lm.evaluate --workdir={thinker}")
  print(f"\nplot: {figure or 'none, matplotlib is not installed'}\nwork directories: {root}")
  if _SEEDS.value < 3:
    print(f"{_SEEDS.value} seed(s) of each arm: a demonstration, no claim. --seeds=5 shows the spread.")
  print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
  errors.run(main)
