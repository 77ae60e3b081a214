"""A model as a verifier: how sure it is that a candidate is right, and what choosing by that is worth.

The score of a candidate is p(Yes) / (p(Yes) + p(No)) after the question, both as whole words to the end of the document
(and the question with them, where it comes after the thought), as the mean over K thoughts (or K written rationales);
GenRM, Zhang et al. 2024, arXiv:2408.15240. Of a discriminative verifier (data.verdicts.label) it is the sigmoid of its
head.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from thinking_lm.data import verdicts
from thinking_lm.data.rows import assemble
from thinking_lm.evaluation.evaluators import Subject
from thinking_lm.evaluation.intervals import Interval, ratio, share, wilson
from thinking_lm.evaluation.summary import aligned, text
from thinking_lm.sharding import on_mesh_of
from thinking_lm.types import Params

MULTIPLE = 32
"""Rows are padded to a multiple of this, so that questions of about one length share a compilation."""


class Scorer:
  """Scores of questions, in batches of one shape."""

  def __init__(self, subject: Subject, batch_size: int):
    self._subject, self._size = subject, batch_size
    thought = dataclasses.replace(subject.config.thought, samples=1)

    def outcome(params, batch, key):
      trace = subject.rollout(params, batch, key, thought=thought)
      return jnp.sum(trace.logp_BGT[:, 0] * batch.weights_BT, axis=1)

    self._outcome = jax.jit(outcome)

  def __call__(self, params: Params, questions: Sequence[bytes], key, samples: int) -> np.ndarray:
    """scores_XK in [0, 1] of X questions for `samples` draws of the thoughts.

    Yes and No follow the same thought: what is drawn depends on the question's number and the draw only.
    """
    scores = np.zeros((len(questions), samples))
    for first, batch in self._batches(questions):
      for k in range(samples):
        with on_mesh_of(params):
          logp_2B = np.asarray(self._outcome(params, batch, jax.random.fold_in(key, k)), np.float64).reshape(2, -1)
        number = min(self._size, len(questions) - first)
        scores[first : first + number, k] = _sigmoid(logp_2B[0] - logp_2B[1])[:number]
    return scores

  def _batches(self, questions) -> Iterator[tuple[int, Any]]:
    data = self._subject.data
    if self._subject.config.data.verdicts.label:
      made = [[verdicts.labelled(data.tokenizer, each, correct) for correct in (True, False)] for each in questions]
    else:
      words = verdicts.words(self._subject.config.data.verdicts)
      made = [[verdicts.example(data.tokenizer, each, word) for word in words] for each in questions]
    longest = max((len(row.tokens) for pair in made for row in pair), default=0)
    length = -(-longest // MULTIPLE) * MULTIPLE
    for first in range(0, len(made), self._size):
      some = made[first : first + self._size]
      pairs = [*some, *[(None, None)] * (self._size - len(some))]
      rows = [row and (row.tokens, row.targets, row.weights) for side in zip(*pairs, strict=True) for row in side]
      ids_B = np.tile(np.arange(first, first + self._size, dtype=np.uint32), 2)
      yield first, jax.tree.map(jnp.asarray, assemble(rows, length, ids_B, data.vocabulary))


def _sigmoid(x):
  return 0.5 * (1 + np.tanh(x / 2))


def written(questions: Sequence[verdicts.Line], generate: Callable[[list[bytes]], list[bytes]]) -> list[bytes]:
  """The questions behind rationales that the model writes itself; `generate` continues prompts with text."""
  heads = [line.prompt + line.candidate + verdicts.REASON for line in questions]
  rationales = [text.split(verdicts.QUESTION)[0] for text in generate(heads)]
  return [
    verdicts.question(line.prompt, line.candidate, rationale)
    for line, rationale in zip(questions, rationales, strict=True)
  ]


class Choice(NamedTuple):
  """What picking one of N candidates is worth, shares of problems whose pick is right, with 95 % intervals.

  first: the first candidate (pass@1 of the solver). majority: the most frequent candidate, the earlier one of equals.
  best: the candidate with the highest score. oracle: any candidate is right, the most that a choice can reach.
  """

  first: Interval
  majority: Interval
  best: Interval
  oracle: Interval


def choose(lines: Sequence[verdicts.Line], scores_X: np.ndarray, most: int | None = None) -> Choice:
  """Best-of-N over the lines with one prompt each; at most the first `most` candidates of a problem."""
  right: dict[str, list[float]] = {name: [] for name in Choice._fields}
  for numbers in by_prompt(lines).values():
    numbers = numbers[:most]
    texts = [lines[number].candidate for number in numbers]
    correct = [float(lines[number].correct) for number in numbers]
    right["first"].append(correct[0])
    right["majority"].append(correct[texts.index(max(texts, key=texts.count))])
    right["best"].append(correct[int(np.argmax([scores_X[number] for number in numbers]))])
    right["oracle"].append(max(correct))
  return Choice(**{name: wilson(float(np.mean(values)), len(values)) for name, values in right.items()})


def by_prompt(lines: Sequence[verdicts.Line]) -> Mapping[bytes, list[int]]:
  """prompt -> numbers of its lines, in order."""
  found: dict[bytes, list[int]] = {}
  for number, line in enumerate(lines):
    found.setdefault(line.prompt, []).append(number)
  return found


class Judgement(NamedTuple):
  """How good the scores are as verdicts on single candidates.

  accuracy: share of candidates on whose right side of 1/2 the score lies. area: under the ROC curve, the probability
  that a right candidate scores above a wrong one (ties count half); None without both. brier: mean (score - right)^2.
  """

  accuracy: Interval
  area: float | None
  brier: Interval


def judge(lines: Sequence[verdicts.Line], scores_X: np.ndarray) -> Judgement:
  """Of all lines; the units of the intervals are problems."""
  correct_X = np.array([line.correct for line in lines], float)
  groups = list(by_prompt(lines).values())
  total = lambda values_X: np.array([values_X[numbers].sum() for numbers in groups], float)
  ones = total(np.ones(len(lines)))
  hits = share(total(((scores_X > 0.5) == correct_X).astype(float)), ones)
  return Judgement(hits, area(scores_X, correct_X), ratio(total((scores_X - correct_X) ** 2), ones))


def area(scores_X: np.ndarray, correct_X: np.ndarray) -> float | None:
  """Mann-Whitney: P(score of a right one > score of a wrong one) + P(equal) / 2."""
  right, wrong = np.sort(scores_X[correct_X > 0]), np.sort(scores_X[correct_X == 0])
  if not len(right) or not len(wrong):
    return None
  below = np.searchsorted(wrong, right, side="left") + np.searchsorted(wrong, right, side="right")
  return float(below.mean() / 2 / len(wrong))


def table(choice: Choice, judgement: Judgement, sizes: Sequence[int], rationales: int) -> str:
  """Both, in aligned columns with intervals."""
  number = "/".join(map(str, sizes))
  rows = [("choice", "problems solved")]
  rows += [
    ("first candidate", text(choice.first)),
    (f"majority of {number}", text(choice.majority)),
    (f"best of {number} by the verifier, {rationales} rationale(s)", text(choice.best)),
    (f"any of {number}", text(choice.oracle)),
  ]
  verdicts_ = [("verdicts", ""), ("accuracy", text(judgement.accuracy)), ("Brier score", text(judgement.brier))]
  verdicts_.append(("area under the ROC curve", "-" if judgement.area is None else f"{judgement.area:.4f}"))
  return f"{aligned(rows)}\n\n{aligned(verdicts_)}"
