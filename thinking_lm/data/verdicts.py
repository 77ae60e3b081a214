"""Problems, candidate answers and whether they are right: what a verifier learns from.

A file has one JSON object a line, with `prompt`, `candidate`, `correct` (true or false), and where they are known
`answer` and `rationale`; `python -m thinking_lm.candidates` writes such files. Each line is a *verdict* example, laid
out as border, prompt, candidate, question | verdict, where only what is behind the bar has weight. This is GenRM
(Zhang et al. 2024, arXiv:2408.15240): the verifier is a language model that says Yes or No.

`verdicts.rationale` puts the line's written rationale between candidate and question, to be learned as text (their CoT
variant); a thought before the verdict is the other way to reason. `verdicts.instead` lays an example out for a thought
in the rationale's very place: sampled, persistent, of `verdicts.padded` tokens and with thought.rotary `advance` it is
the same computation as that text, so that a run may start from one that learned to write and go on by any estimator.
`verdicts.solutions` mixes in, for each line with a right candidate, the plain solution with that weight (their lambda).
With `verdicts.label` it is their control, the discriminative verifier: the question alone, at whose last token a head
says how sure the model is, by binary cross-entropy.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import numpy as np

from thinking_lm import config
from thinking_lm.data import sources
from thinking_lm.data.tasks import Example, exact_match
from thinking_lm.data.tokenizer import Tokenizer
from thinking_lm.errors import ConfigError, DataError

QUESTION, YES, NO = b"\nIs this right? ", b"Yes", b"No"
REASON = b"\nLet us see: "


@dataclasses.dataclass(frozen=True)
class VerdictConfig:
  """source=verdicts: what is made of each line."""

  solutions: float = config.option(0.0, "weight of a right candidate as a solution to learn (GenRM's lambda)", low=0)
  rationale: bool = config.option(False, "the line's written rationale comes before the verdict, and is learned")
  padded: int = config.option(0, "rationale: bytes that it is padded to, with spaces; 0: as it is written", low=0)
  instead: bool = config.option(False, "the question comes after a thought, which stands where a rationale would")
  label: bool = config.option(
    False, "the verdict is a label that a scalar head gives, no word: a discriminative verifier"
  )

  def faults(self) -> list[str]:
    """Rules across fields."""
    found = []
    if self.label and (self.solutions or self.rationale or self.instead):
      found.append("label has no words to learn: set solutions to 0, rationale and instead to false")
    if self.rationale and self.instead:
      found.append("rationale and instead are two ways to fill one place: set one of them to false")
    if self.padded and not self.rationale:
      found.append(f"padded {self.padded} is the length of a written rationale: it needs rationale true")
    return found


@dataclasses.dataclass(frozen=True)
class Line:
  """One line of a file, as bytes."""

  prompt: bytes
  candidate: bytes
  correct: bool
  rationale: bytes = b""


def read(patterns: str, option: str) -> list[Line]:
  """The lines of all files. Raises ConfigError (no file), DataError (a line that is none, by file and number)."""
  lines = []
  for path in sources.paths(patterns, option):
    for number, text in enumerate(path.read_text().splitlines(), start=1):
      try:
        row = json.loads(text)
        prompt, candidate, correct = row["prompt"], row["candidate"], row["correct"]
        if not isinstance(correct, bool):
          raise TypeError("correct")
        lines.append(Line(prompt.encode(), candidate.encode(), correct, row.get("rationale", "").encode()))
      except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
          f"{path} line {number} is no verdict: it needs prompt and candidate (texts) and correct (true or false), got "
          f"{text[:80]!r}"
        ) from error
  if not lines:
    raise DataError(f"{option}={patterns!r} has no lines")
  return lines


def divide(lines: Sequence[Line], fractions: tuple[float, float]) -> dict[str, list[Line]]:
  """Lines by split. All candidates for one prompt are in one split, which a hash of the prompt decides."""
  found: dict[str, list[Line]] = {split: [] for split in sources.SPLITS}
  validation, test = fractions
  for line in lines:
    place = int.from_bytes(hashlib.sha256(line.prompt).digest()[:8], "big") / 2**64
    found["validation" if place < validation else "test" if place < validation + test else "train"].append(line)
  return found


def question(prompt: bytes, candidate: bytes, rationale: bytes | None = None) -> bytes:
  """The text after which the verdict is said."""
  return prompt + candidate + (QUESTION if rationale is None else REASON + rationale + QUESTION)


def words(options: VerdictConfig) -> tuple[bytes, bytes]:
  """What is said behind `opening` if the candidate is right, and if it is not."""
  before = QUESTION if options.instead else b""
  return before + YES, before + NO


def opening(line: Line, options: VerdictConfig) -> bytes:
  """The text before the words of a verdict, and before a thought that leads to them."""
  return line.prompt + line.candidate + REASON if options.instead else question(line.prompt, line.candidate)


def example(tokenizer: Tokenizer, prompt: bytes, answer: bytes, weight: float = 1.0) -> Example:
  """border, prompt | answer, border: what is behind the bar has `weight`."""
  border = np.array([tokenizer.vocabulary.document], np.int32)
  head, tail = (np.asarray(tokenizer.encode(text), np.int32) for text in (prompt, answer))
  text = np.concatenate([head, tail])
  weights = np.full(len(text) + 1, weight, np.float32)
  weights[: len(head)] = 0.0
  return Example(np.concatenate([border, text]), np.concatenate([text, border]), weights, prompt, answer)


def labelled(tokenizer: Tokenizer, asked: bytes, correct: bool) -> Example:
  """A question whose last token has the label 1 or 0 as its target, the only one of weight."""
  border = np.array([tokenizer.vocabulary.document], np.int32)
  tokens = np.concatenate([border, np.asarray(tokenizer.encode(asked), np.int32)])
  last = np.arange(len(tokens)) == len(tokens) - 1
  return Example(tokens, np.int32(last * correct), np.float32(last), asked, YES if correct else NO)


def _padded(rationale: bytes, length: int) -> bytes:
  if length and len(rationale) > length:
    raise ConfigError(f"data.verdicts.padded {length} is less than the {len(rationale)} bytes of {rationale!r}")
  return rationale.ljust(length)


def examples(lines: Sequence[Line], options: VerdictConfig, tokenizer: Tokenizer, train: bool) -> list[Example]:
  """Verdicts; for training also solutions, each right after the verdict on it."""
  found = []
  for line in lines:
    verdict = words(options)[not line.correct]
    if options.label:
      found.append(labelled(tokenizer, opening(line, options), line.correct))
    elif options.rationale:
      head = line.prompt + line.candidate + REASON
      found.append(example(tokenizer, head, _padded(line.rationale, options.padded) + QUESTION + verdict))
    else:
      found.append(example(tokenizer, opening(line, options), verdict))
    if train and line.correct and options.solutions:
      found.append(example(tokenizer, line.prompt, line.candidate, options.solutions))
  return found


@dataclasses.dataclass(frozen=True)
class _Options:
  """What an evaluation asks of a task's options."""

  name: str = "verdicts"
  weigh_prompt: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class VerdictTask:
  """All splits of verdict examples, read like a `tasks.Task`."""

  splits: dict[str, list[Example]]
  tokenizer: Tokenizer
  options: _Options = _Options()
  tagging: bool = False
  difficulty: None = None

  def count(self, split: str) -> int:
    """Examples of a split."""
    return len(self.splits[split])

  def example(self, seed: int, split: str, index: int) -> Example:
    """Example `index` of a split."""
    del seed
    return self.splits[split][index]

  def score(self, example: Example, answer: bytes | Sequence[int]) -> float:
    """1 if the answer, as bytes or token ids, is the example's verdict, else 0."""
    given = answer if isinstance(answer, bytes) else self.tokenizer.decode(np.asarray(answer))
    return exact_match(example.answer.split(QUESTION)[-1], given.split(QUESTION)[-1])

  def longest(self) -> int:
    """Tokens of the longest example."""
    return max(len(each.tokens) for split in self.splits.values() for each in split)

  def digest(self) -> str:
    """SHA-256 of all examples."""
    total = hashlib.sha256()
    for split in sources.SPLITS:
      for each in self.splits[split]:
        for array in (each.tokens, each.targets, each.weights):
          total.update(len(array).to_bytes(8, "big") + array.tobytes())
      total.update(b"/")
    return total.hexdigest()


def build(data, tokenizer: Tokenizer) -> VerdictTask:
  """The task of a DataConfig. Raises ConfigError or DataError."""
  lines = read(data.input, "data.input")
  if data.verdicts.rationale and not all(line.rationale for line in lines):
    raise ConfigError("data.verdicts.rationale is on, but not every line of data.input has a rationale")
  own = [split for split in ("validation", "test") if getattr(data, f"{split}_input")]
  fractions = tuple(0.0 if split in own else getattr(data, f"{split}_fraction") for split in ("validation", "test"))
  parts = divide(lines, fractions)
  for split in own:
    parts[split] = read(getattr(data, f"{split}_input"), f"data.{split}_input")
  return VerdictTask(
    {split: examples(part, data.verdicts, tokenizer, split == "train") for split, part in parts.items()},
    tokenizer,
    tagging=data.verdicts.label,
  )
