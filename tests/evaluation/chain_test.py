"""From a solver to a choice by the verifier that its candidates taught, by the commands; every figure counted again."""

import collections
import json

import numpy as np
import pytest

from tests.quick import command
from thinking_lm import experiment
from thinking_lm.data import verdicts
from thinking_lm.evaluation import verifiers
from thinking_lm.training import loop, state

PROBLEMS, SAMPLES, MODULUS, MOST, K = 16, 6, 3, 5, 3


def trained(path, **sections):
  """Work directory of a tiny run, whose config has these changes."""
  values = experiment.default_config()
  values.data.sequence_length = 0
  values.model.update(layers=1, width=16, heads=2)
  values.train.tensorboard = False
  values.health.every = 0
  for name, changes in sections.items():
    values[name].update(changes)
  loop.train(experiment.build(experiment.parse(values)).run(), str(path))
  return path


def answer(prompt: str) -> str:
  """`2+1*2=`, worked from left to right, modulo MODULUS."""
  value = int(prompt[0])
  for sign, digit in zip(prompt[1:-1:2], prompt[2:-1:2], strict=True):
    value = {"+": value + int(digit), "-": value - int(digit), "*": value * int(digit)}[sign] % MODULUS
  return str(value)


@pytest.fixture(scope="module")
def solver(tmp_path_factory):
  """Work directory of one that knows what an answer looks like."""
  return trained(
    tmp_path_factory.mktemp("chain") / "solver",
    data=dict(source="task", task=dict(name="modular_arithmetic", length=3, modulus=MODULUS)),
    train=dict(steps=60, batch_size=32),
    optimizer=dict(learning_rate=1e-2, warmup_steps=5),
  )


def candidates(solver, name: str, *more: str) -> list[dict]:
  """Lines of a file of this name beside the solver."""
  path = solver.parent / name
  flags = [f"--workdir={solver}", f"--output={path}", f"--problems={PROBLEMS}", f"--samples={SAMPLES}", *more]
  code, out, errors = command("candidates", *flags)
  assert code == 0, errors
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  right = sum(line["correct"] for line in lines)
  assert out == f"{len(lines)} candidates for {PROBLEMS} problems, {right} of them right, by step 60: {path}\n"
  return lines


@pytest.fixture(scope="module")
def some(solver):
  return candidates(solver, "some.jsonl", "--distinct", "--balance")


def test_candidates_are_checked_distinct_and_balanced(some):
  problems = collections.defaultdict(list)
  for line in some:
    assert line["answer"] == answer(line["prompt"]) and line["rationale"].endswith(f": {line['answer']}")
    assert line["correct"] == (line["candidate"].strip() == line["answer"])
    problems[line["prompt"]].append(line)
  assert 1 < len(problems) <= PROBLEMS
  for lines in problems.values():
    assert len({line["candidate"] for line in lines}) == len(lines) == 2 * sum(line["correct"] for line in lines)
    assert sum(line["count"] for line in lines) <= SAMPLES
  assert max(line["count"] for line in some) > 1


def kept(lines) -> list[dict]:
  """What --distinct and --balance leave of the lines of one problem."""
  count = collections.Counter(line["candidate"] for line in lines)
  once = [line | dict(count=count.pop(line["candidate"])) for line in lines if line["candidate"] in count]
  right = [line for line in once if line["correct"]]
  wrong = [line for line in once if not line["correct"]]
  pairs = list(zip(right, wrong, strict=False))
  return [line for line in once if any(line in pair for pair in pairs)]


@pytest.mark.slow  # 40 CPU-seconds, most of them compiling
def test_a_verifier_learns_from_them_and_its_choices_are_counted(solver, some, tmp_path):
  lines = candidates(solver, "all.jsonl")
  assert len(lines) == PROBLEMS * SAMPLES > len(some)
  assert some == [line for first in range(0, len(lines), SAMPLES) for line in kept(lines[first : first + SAMPLES])]
  verifier = trained(
    tmp_path / "verifier",
    data=dict(source="verdicts", input=str(solver.parent / "some.jsonl"), validation_fraction=0.0, test_fraction=0.0),
    thought=dict(kind="sampled", length=1, placement="answer", samples=2, lookahead=0, temperature=2.0),
    objective=dict(score_weight=1.0),
    train=dict(steps=20, batch_size=8),
  )
  flags = [f"--workdir={verifier}", f"--candidates={solver.parent}/all.jsonl", f"--rationales={K}", f"--most={MOST}"]
  code, out, errors = command("verify", *flags)
  assert code == 0, errors
  path = verifier / "evaluation" / "verify-20.json"
  found = json.loads(path.read_text())
  assert (found["step"], found["candidates"], found["rationales"]) == (20, len(lines), K)
  assert out.endswith(f"written: {path}\n")

  scores = found["scores"]
  subject, params, _ = experiment.load(str(verifier), rows=False)
  asked = [verdicts.question(line["prompt"].encode(), line["candidate"].encode()) for line in lines]
  scores_XK = verifiers.Scorer(subject, 32)(params, asked, state.key(0, "evaluate"), K)
  assert np.ptp(scores_XK, axis=1).max() > 1e-4, "rationales differ"
  np.testing.assert_allclose(scores, [sum(row) / K for row in scores_XK], rtol=1e-4)

  problems = collections.defaultdict(list)
  for line, score in zip(lines, scores, strict=True):
    problems[line["prompt"]].append((line["candidate"], line["correct"], score))
  groups = [group[:MOST] for group in problems.values()]
  votes = [collections.Counter(text for text, _, _ in group).most_common(1)[0][0] for group in groups]
  solved = dict(
    first=[group[0][1] for group in groups],
    majority=[vote == answer(prompt) for vote, prompt in zip(votes, problems, strict=True)],
    best=[max(group, key=lambda one: one[2])[1] for group in groups],
    oracle=[any(right for _, right, _ in group) for group in groups],
  )
  assert found["problems"] == len(groups) and 0 < sum(solved["first"]) < sum(solved["oracle"])
  for name, right in solved.items():
    assert found[name][0] == pytest.approx(sum(right) / len(groups)), name
  rights, wrongs = ([s for s, line in zip(scores, lines, strict=True) if line["correct"] is c] for c in (True, False))
  above = sum((right > wrong) + (right == wrong) / 2 for right in rights for wrong in wrongs)
  assert found["area"] == pytest.approx(above / len(rights) / len(wrongs))
  hits = sum(right > 0.5 for right in rights) + sum(wrong <= 0.5 for wrong in wrongs)
  assert found["accuracy"][0] == pytest.approx(hits / len(lines))
  squares = sum((1 - right) ** 2 for right in rights) + sum(wrong**2 for wrong in wrongs)
  assert found["brier"][0] == pytest.approx(squares / len(lines))
