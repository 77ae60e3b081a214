"""Files of verdicts: what becomes of a line, who is in which split, and what is refused."""

import json

import numpy as np
import pytest

from thinking_lm.data import verdicts
from thinking_lm.data.pipeline import DataConfig, build
from thinking_lm.data.tokenizer import ByteTokenizer
from thinking_lm.errors import ConfigError, DataError


def write(path, rows):
  """A JSONL file."""
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def rows(number=60, **more):
  """Three candidates for each problem, the first one right."""
  return [
    dict(prompt=f"{p}+1=", candidate=str(p + 1 + c), correct=c == 0) | more for p in range(number) for c in range(3)
  ]


def said(example) -> tuple[bytes, bytes]:
  """(what has no weight, what has) of an example, as text."""
  weighed = example.weights > 0
  decode = lambda ids: ByteTokenizer().decode(ids[ids != 256])
  return decode(example.targets[~weighed]), decode(example.targets[weighed])


def test_a_line_becomes_a_question_and_a_verdict():
  lines = [verdicts.Line(b"1+1=", b"2", True), verdicts.Line(b"1+1=", b"3", False)]
  found = verdicts.examples(lines, verdicts.VerdictConfig(solutions=0.5), ByteTokenizer(), train=True)
  assert [said(each) for each in found] == [
    (b"1+1=2\nIs this right? ", b"Yes"),
    (b"1+1=", b"2"),
    (b"1+1=3\nIs this right? ", b"No"),
  ]
  assert found[1].weights.max() == 0.5 and found[0].weights.max() == 1
  assert len(verdicts.examples(lines, verdicts.VerdictConfig(solutions=0.5), ByteTokenizer(), train=False)) == 2


def test_a_written_rationale_is_learned_before_the_verdict():
  line = verdicts.Line(b"1+1=", b"3", False, b"one and one is 2")
  (found,) = verdicts.examples([line], verdicts.VerdictConfig(rationale=True), ByteTokenizer(), train=True)
  assert said(found) == (b"1+1=3\nLet us see: ", b"one and one is 2\nIs this right? No")
  assert verdicts.question(b"1+1=", b"3", line.rationale) == b"1+1=3\nLet us see: one and one is 2\nIs this right? "


def test_a_thought_takes_the_place_of_a_padded_rationale():
  line = verdicts.Line(b"1+1=", b"3", False, b"it is 2")
  make = lambda **options: verdicts.examples([line], verdicts.VerdictConfig(**options), ByteTokenizer(), train=False)[0]
  written, thought = make(rationale=True, padded=9), make(instead=True)
  assert said(thought) == (b"1+1=3\nLet us see: ", b"\nIs this right? No")
  assert said(written) == (b"1+1=3\nLet us see: ", b"it is 2  \nIs this right? No")
  with pytest.raises(ConfigError, match=r"padded 6 is less than the 7 bytes of b'it is 2'"):
    make(rationale=True, padded=6)
  faults = verdicts.VerdictConfig(instead=True, rationale=True).faults() + verdicts.VerdictConfig(padded=3).faults()
  assert [line.split(":")[0] for line in faults] == [
    "rationale and instead are two ways to fill one place",
    "padded 3 is the length of a written rationale",
  ]


def test_all_candidates_of_a_problem_are_in_one_split(tmp_path):
  data = build(DataConfig(source="verdicts", input=write(tmp_path / "v.jsonl", rows()), sequence_length=0))
  prompts = {
    split: {data.task.example(0, split, i).prompt.split(b"=")[0] for i in range(data.rows(split))}
    for split in data.splits
  }
  assert data.rows("train") == 3 * len(prompts["train"]) and sum(map(len, prompts.values())) == 60
  assert min(map(len, prompts.values())) > 0
  batch = next(data.batches("train", global_batch=4))
  assert batch.tokens_BT.shape[1] == data.sequence_length and (batch.weights_BT.sum(1) >= 3).all()


def test_a_file_of_its_own_for_a_split_and_the_digest_of_content(tmp_path):
  first, other = write(tmp_path / "a.jsonl", rows(5)), write(tmp_path / "b.jsonl", rows(4))
  options = dict(source="verdicts", sequence_length=0, test_fraction=0.0)
  data = build(DataConfig(input=first, validation_input=other, **options))
  assert [data.rows(split) for split in ("train", "validation", "test")] == [15, 12, 0]
  assert build(DataConfig(input=first, validation_input=other, **options)).digest == data.digest
  assert build(DataConfig(input=other, validation_input=other, **options)).digest != data.digest


@pytest.mark.parametrize(
  "line", ["[]", "{", '{"prompt": "a", "candidate": "b", "correct": 1}', '{"prompt": "a", "correct": true}']
)
def test_a_line_that_is_no_verdict_is_named(tmp_path, line):
  (tmp_path / "v.jsonl").write_text(json.dumps(rows()[0]) + "\n" + line + "\n")
  with pytest.raises(DataError, match=r"v\.jsonl line 2 is no verdict: it needs prompt and candidate"):
    verdicts.read(str(tmp_path / "v.jsonl"), "data.input")


def test_missing_rationales_and_empty_files_are_refused(tmp_path):
  options = DataConfig(
    source="verdicts",
    input=write(tmp_path / "v.jsonl", rows()),
    sequence_length=0,
    verdicts=verdicts.VerdictConfig(rationale=True),
  )
  with pytest.raises(ConfigError, match=r"not every line of data\.input has a rationale"):
    build(options)
  with pytest.raises(DataError, match="has no lines"):
    verdicts.read(write(tmp_path / "empty.jsonl", []), "data.input")


def test_the_score_reads_the_verdict_behind_a_rationale():
  task = verdicts.VerdictTask({}, ByteTokenizer())
  example = verdicts.example(ByteTokenizer(), b"?", b"so it is" + verdicts.QUESTION + b"Yes")
  assert task.score(example, b"another way" + verdicts.QUESTION + b"Yes") == 1
  assert task.score(example, np.frombuffer(b"another way" + verdicts.QUESTION + b"No", np.uint8)) == 0
