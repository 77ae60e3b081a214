"""Synthetic tasks: pure functions of (seed, split, index), each with a verifier.

Example `index` of a split is drawn from a Philox stream whose key is a hash of (task, seed, split) and the index, so
any example is made without the others, and no stream serves two splits. Streams differ, inputs may still coincide:
where a task has few distinct inputs (a word problem has order ** length of them, so Z2 of length 8 has 256), evaluation
examples occur in training too, and accuracy measures fitting and not generalisation.

Two shapes of task. A *tagging* task labels every token (targets are labels, not next tokens; no document border). A
*text* task is a prompt and an answer in bytes, laid out as border, prompt, answer; only the answer and the border that
ends it have weight, unless `weigh_prompt`.
"""

import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Sequence

import numpy as np

from thinking_lm import config
from thinking_lm.data import rationales
from thinking_lm.data.tokenizer import ByteTokenizer, SymbolTokenizer, Tokenizer
from thinking_lm.errors import ConfigError

MAX_ORDER = 720


@dataclasses.dataclass(frozen=True)
class Example:
  """One example as token arrays of one length (int32, int32, float32), and as prompt and expected answer.

  prompt, answer: the bytes of the two; for a tagging task the symbols and the labels by name.
  """

  tokens: np.ndarray
  targets: np.ndarray
  weights: np.ndarray
  prompt: bytes
  answer: bytes


@dataclasses.dataclass(frozen=True)
class Task:
  """What a line of TASKS makes of a TaskConfig.

  draw: (generator, length) -> Example.
  score: (expected answer, given answer), both bytes -> [0, 1].
  longest: length -> most tokens that an example of it takes.
  tagging: targets are labels and not next tokens, so that there is nothing to continue.
  difficulty: Example -> how hard it is, one number or, of a tagging task, one for each label, where examples of a
    length or their labels differ in it; None elsewhere.
  """

  options: "TaskConfig"
  tokenizer: Tokenizer
  draw: Callable[[np.random.Generator, int], Example]
  verify: Callable[[bytes, bytes], float]
  longest: Callable[[int], int]
  tagging: bool
  difficulty: Callable[[Example], int | Sequence[int]] | None = None

  def length(self, split: str) -> int:
    """Elements of an example of this split."""
    return self.options.length if split == "train" else self.options.eval_length or self.options.length

  def count(self, split: str) -> int:
    """Examples of the split (of one epoch, for train)."""
    return self.options.train_examples if split == "train" else self.options.eval_examples

  def example(self, seed: int, split: str, index: int) -> Example:
    """The example; the same arguments give the same one, in any process and order."""
    return self.draw(generator(self.options.name, seed, split, index), self.length(split))

  def score(self, example: Example, answer: bytes | Sequence[int]) -> float:
    """How right an answer (bytes, or token ids up to an optional border) is, in [0, 1]."""
    if not isinstance(answer, bytes):
      ids = np.asarray(answer, np.int64)
      ends = np.flatnonzero(ids == self.tokenizer.vocabulary.document)
      answer = self.tokenizer.decode(ids[: ends[0]] if ends.size else ids)
    return self.verify(example.answer, answer)


@functools.lru_cache(maxsize=64)
def _stream(name: str, seed: int, split: str) -> int:
  return int.from_bytes(hashlib.sha256(f"{name}/{seed}/{split}".encode()).digest()[:8], "big")


def generator(name: str, seed: int, split: str, index: int) -> np.random.Generator:
  """The random stream of one example."""
  return np.random.Generator(np.random.Philox(key=np.array([_stream(name, seed, split), index], np.uint64)))


def exact_match(expected: bytes, given: bytes) -> float:
  """1 if the answers are equal but for white space around them, else 0."""
  return float(expected.strip() == given.strip())


def final_match(expected: bytes, given: bytes) -> float:
  """`exact_match` of what stands behind the written steps."""
  return exact_match(rationales.final(expected), rationales.final(given))


def label_accuracy(expected: bytes, given: bytes) -> float:
  """The share of labels (names separated by white space) that are right; missing and surplus ones count as wrong."""
  labels, guesses = expected.split(), given.split()
  right = sum(label == guess for label, guess in zip(labels, guesses, strict=False))
  return right / max(len(labels), len(guesses), 1)


@functools.lru_cache(maxsize=16)
def parse_group(name: str) -> tuple[tuple[str, ...], np.ndarray]:
  """Names of a group's elements and its table: table[a, b] is the product a b (for permutations: first a, then b).

  Zn: integers modulo n under addition. Sn, An: all, or the even, permutations of n points in lexicographic order, named
  by the images of 0, 1, ...
  """
  match = re.fullmatch(r"([ZSA])([1-9]\d{0,3})", name)
  kind, n = (match[1], int(match[2])) if match else ("", 0)
  if kind == "Z" and 2 <= n <= MAX_ORDER:
    return tuple(map(str, range(n))), np.add.outer(np.arange(n), np.arange(n)).astype(np.int32) % n
  if kind in ("S", "A") and (2 if kind == "S" else 3) <= n <= 6:
    points = [p for p in itertools.permutations(range(n)) if kind == "S" or _even(p)]
    number = {p: i for i, p in enumerate(points)}
    table = [[number[tuple(b[image] for image in a)] for b in points] for a in points]
    return tuple("".join(map(str, p)) for p in points), np.array(table, np.int32)
  raise ConfigError(f"unknown group {name!r}; known: Z2 ... Z{MAX_ORDER}, S2 ... S6, A3 ... A6")


def _even(permutation: Sequence[int]) -> bool:
  return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


def word_problem(options: "TaskConfig") -> Task:
  """Running product: tokens are `length` group elements, uniform; the label at t is x_1 x_2 ... x_t.

  The identity problem of Barrington (1989): for S5 the label needs depth (NC1-complete), for Z_n and S3 less. Of Z2 it
  is the parity of every prefix. The difficulty of a label is the number of elements in its product.
  """
  names, _ = parse_group(options.group)
  tokenizer = SymbolTokenizer(names)
  draw = functools.partial(_draw_word_problem, options.group, tokenizer)
  return Task(
    options,
    tokenizer,
    draw,
    label_accuracy,
    int,
    tagging=options.name in TAGGING,
    difficulty=lambda example: range(1, len(example.tokens) + 1),
  )


def _draw_word_problem(group: str, tokenizer: SymbolTokenizer, random: np.random.Generator, length: int) -> Example:
  names, table = parse_group(group)
  tokens = random.integers(len(names), size=length, dtype=np.int32)
  labels = list(itertools.accumulate(tokens.tolist(), lambda a, b: int(table[a, b])))
  targets = np.array(labels, np.int32)
  return Example(tokens, targets, np.ones(length, np.float32), tokenizer.decode(tokens), tokenizer.decode(targets))


def bernoulli_contexts(options: "TaskConfig") -> Task:
  """`length` contexts c, uniform over C; the label at each is 1 with probability p_c = (2c + 1) / (2C), else 0.

  No label can be known, and the best prediction is: what a model says of its own certainty has a right answer here, and
  its accuracy a ceiling of mean max(p_c, 1 - p_c). Labels are the symbols `0` and `1`, contexts `c0`, `c1` ...
  """
  tokenizer = SymbolTokenizer(("0", "1", *(f"c{c}" for c in range(options.contexts))))
  draw = functools.partial(_draw_bernoulli, options.contexts, tokenizer)
  return Task(options, tokenizer, draw, label_accuracy, int, tagging=True)


def _draw_bernoulli(contexts: int, tokenizer: SymbolTokenizer, random: np.random.Generator, length: int) -> Example:
  contexts_T = random.integers(contexts, size=length, dtype=np.int32)
  targets = (random.random(length) < (2 * contexts_T + 1) / (2 * contexts)).astype(np.int32)
  tokens = contexts_T + 2
  return Example(tokens, targets, np.ones(length, np.float32), tokenizer.decode(tokens), tokenizer.decode(targets))


def _text_task(options: "TaskConfig", write: Callable, longest: Callable[[int], int]) -> Task:
  draw = functools.partial(_draw_text, write, options)
  steps = rationales.longest(options.name, options.written, options.modulus)
  judge = final_match if options.written else exact_match
  return Task(options, ByteTokenizer(), draw, judge, lambda length: longest(length) + steps, tagging=False)


def _draw_text(write: Callable, options: "TaskConfig", random: np.random.Generator, length: int) -> Example:
  prompt, answer = write(options, random, length)
  if options.written:
    answer = rationales.shown(rationales.STEPS[options.name](prompt, options.modulus)[-options.written :], answer)
  text = np.frombuffer(prompt + answer, np.uint8).astype(np.int32)
  border = np.array([256], np.int32)
  weights = np.ones(len(text) + 1, np.float32)
  if not options.weigh_prompt:
    weights[: len(prompt)] = 0.0
  return Example(np.concatenate([border, text]), np.concatenate([text, border]), weights, prompt, answer)


def modular_arithmetic(options: "TaskConfig") -> Task:
  """`length` operands below the modulus, joined by + - * and worked from left to right (no precedence), modulo m.

  Example with modulus 10: prompt `3+9*2=`, answer `4`.
  """
  digits = len(str(options.modulus - 1))
  return _text_task(options, _write_arithmetic, lambda length: 1 + length * (digits + 1) + digits)


def _write_arithmetic(options: "TaskConfig", random: np.random.Generator, length: int) -> tuple[bytes, bytes]:
  operands = random.integers(options.modulus, size=length).tolist()
  signs = [""] + ["+-*"[i] for i in random.integers(3, size=length - 1)]
  value = 0
  for sign, operand in zip(signs, operands, strict=True):
    value = dict([("", operand), ("+", value + operand), ("-", value - operand), ("*", value * operand)])[sign]
  text = "".join(sign + str(operand) for sign, operand in zip(signs, operands, strict=True))
  return f"{text}=".encode(), str(value % options.modulus).encode()


def last_letter(options: "TaskConfig") -> Task:
  """The last letters of `length` random words of 2 to 6 letters: prompt `tree axe=`, answer `ee` (Wei et al. 2022)."""
  return _text_task(options, _write_last_letter, lambda length: 1 + 7 * length + length)


def _write_last_letter(options: "TaskConfig", random: np.random.Generator, length: int) -> tuple[bytes, bytes]:
  sizes = random.integers(2, 7, size=length).tolist()
  letters = random.integers(ord("a"), ord("z") + 1, size=sum(sizes), dtype=np.uint8).tobytes()
  ends = list(itertools.accumulate(sizes))
  words = [letters[end - size : end] for size, end in zip(sizes, ends, strict=True)]
  return b" ".join(words) + b"=", b"".join(word[-1:] for word in words)


def variable_tracking(options: "TaskConfig") -> Task:
  """`length` statements that set a variable to a number or to a variable plus a number, modulo m; one is asked for.

  Statements are sentences, so that a model may think between them (after Self-Notes, Lanchantin et al. 2023). Example
  with modulus 10: prompt `a=7. b=a+5. a=b+1. a?`, answer `3`.
  """
  digits = len(str(options.modulus - 1))
  return _text_task(options, _write_tracking, lambda length: 1 + length * (6 + digits) + 2 + digits)


def _write_tracking(options: "TaskConfig", random: np.random.Generator, length: int) -> tuple[bytes, bytes]:
  values: dict[str, int] = {}
  statements = []
  for left, right, number, fresh in zip(
    random.integers(options.variables, size=length).tolist(),
    random.random(length).tolist(),
    random.integers(options.modulus, size=length).tolist(),
    (random.random(length) < 0.2).tolist(),
    strict=True,
  ):
    name, known = chr(ord("a") + left), sorted(values)
    if fresh or not known:
      statements.append(f"{name}={number}. ")
      values[name] = number
    else:
      other = known[int(right * len(known))]
      statements.append(f"{name}={other}+{number}. ")
      values[name] = (values[other] + number) % options.modulus
  asked = sorted(values)[int(random.integers(len(values)))]
  return ("".join(statements) + f"{asked}?").encode(), str(values[asked]).encode()


def parity(options: "TaskConfig") -> Task:
  """Whether the number of ones is odd (PonderNet, arXiv:2107.05407): prompt `+0-+=`, answer `0`.

  As there, one to `length` elements are 1 or -1, written + and -, and the others 0; how many is the difficulty of an
  example, uniform.
  """
  task = _text_task(options, _write_parity, lambda length: 3 + length)
  return dataclasses.replace(task, difficulty=lambda example: len(example.prompt.translate(None, b"0=")))


def _write_parity(options: "TaskConfig", random: np.random.Generator, length: int) -> tuple[bytes, bytes]:
  del options
  count = int(random.integers(1, length + 1))
  signs = random.integers(2, size=length)
  nonzero = random.permutation(length) < count
  elements = "".join(np.where(nonzero, np.array(["+", "-"])[signs], "0"))
  return elements.encode() + b"=", str(elements.count("+") % 2).encode()


TASKS = dict(
  word_problem=word_problem,
  modular_arithmetic=modular_arithmetic,
  last_letter=last_letter,
  variable_tracking=variable_tracking,
  parity=parity,
  bernoulli_contexts=bernoulli_contexts,
)


TAGGING = ("word_problem", "bernoulli_contexts")
"""The tasks that label every token."""


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """Which synthetic task, and how hard."""

  name: str = config.option("word_problem", "the task", choices=TASKS)
  length: int = config.option(
    12, "elements, operands, words, statements, signs of one training example", low=1, high=100000
  )
  eval_length: int = config.option(0, "the same for validation and test; 0: as in training", low=0, high=100000)
  group: str = config.option("S3", "word_problem: the group, Zn, Sn or An")
  modulus: int = config.option(10, "modular_arithmetic, variable_tracking: results are modulo this", low=2, high=1000)
  variables: int = config.option(4, "variable_tracking: how many variables", low=1, high=26)
  contexts: int = config.option(5, "bernoulli_contexts: how many contexts", low=1, high=1000)
  weigh_prompt: bool = config.option(False, "text tasks: prompt tokens have weight 1 too")
  written: int = config.option(0, "text tasks: the last so many steps to the answer are written before it", low=0)
  train_examples: int = config.option(2**20, "examples of one training epoch", low=1, high=2**32 - 1)
  eval_examples: int = config.option(512, "examples of validation, and of test", low=1, high=2**32 - 1)

  @property
  def asks(self) -> bool:
    """Every example is a prompt without weight, then an answer; a tagging task has labels instead."""
    return not self.weigh_prompt and self.name not in TAGGING

  def faults(self) -> list[str]:
    """Rules across fields."""
    found = []
    if self.written and self.name not in rationales.STEPS:
      found.append(f"written is for tasks whose steps a program can write: {', '.join(rationales.STEPS)}")
    try:
      parse_group(self.group)
    except ConfigError as error:
      found += error.faults
    return found


def build(options: TaskConfig) -> Task:
  """The task that the options describe."""
  return config.pick(TASKS, options.name, "task")(options)
