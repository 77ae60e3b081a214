"""Rows: a split of a corpus, or of a task, cut into examples with random access; and batches of them."""

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np

from thinking_lm import types
from thinking_lm.data import sources, tasks
from thinking_lm.errors import DataError


class Row(NamedTuple):
  """One example: at most T tokens, targets and weights; what is missing to T is padding.

  real: bool, where there is a token; padding may also stand between documents.
  """

  tokens: np.ndarray
  targets: np.ndarray
  weights: np.ndarray
  real: np.ndarray | bool = True


class Rows(Protocol):
  """A split with random access."""

  def __len__(self) -> int:
    """Number of rows."""

  def read(self, index: int) -> Row:
    """One row."""


class PackedRows:
  """Documents laid out as one stream, each as border + tokens, cut into rows of T.

  Row i inputs stream[i T : (i + 1) T]; every input predicts what follows it in its document, the last one a border. So
  every token and border is an input once and a target once. Needs only the lengths of the documents.

  Each document starts at a multiple of `align`, which divides T; what is left before the next one is padding. It is
  fewer than `align` places, in one row with the end of the document: no row starts with padding.
  """

  def __init__(self, corpus: sources.Corpus, spans: sources.Spans, length: int, border: int, align: int = 1):
    self._corpus, self._spans, self._length = corpus, spans, length
    self._border = np.array([border], np.int32)
    sizes_N = spans.stop_N - spans.start_N + 1
    places_N = -(-sizes_N // align) * align
    self._begins_N = np.cumsum(places_N) - places_N
    self._ends_N = self._begins_N + sizes_N

  def __len__(self) -> int:
    return -(-int(self._ends_N[-1]) // self._length) if len(self._ends_N) else 0

  def read(self, index: int) -> Row:
    begin = index * self._length
    end = min(begin + self._length, int(self._ends_N[-1]))
    tokens, targets = np.zeros(end - begin, np.int32), np.zeros(end - begin, np.int32)
    real = np.zeros(end - begin, bool)
    number = int(np.searchsorted(self._ends_N, begin, side="right"))
    while number < len(self._ends_N) and self._begins_N[number] < end:
      start, stop = max(begin, int(self._begins_N[number])), min(end, int(self._ends_N[number]))
      ids = self._piece(number, start - int(self._begins_N[number]), stop - int(self._begins_N[number]) + 1)
      piece = slice(start - begin, stop - begin)
      tokens[piece], targets[piece], real[piece] = ids[:-1], ids[1:], True
      number += 1
    return Row(tokens, targets, real.astype(np.float32), real)

  def _piece(self, number: int, begin: int, end: int) -> np.ndarray:
    """int32 [begin:end] of border + tokens + border of a document; at least two of them."""
    start, stop = int(self._spans.start_N[number]), int(self._spans.stop_N[number])
    first, last = max(begin - 1, 0), min(end - 1, stop - start)
    ids = self._corpus.tokens(int(self._spans.document_N[number]), start + first, start + last)
    head, tail = self._border[: begin == 0], self._border[: end - 1 > stop - start]
    return np.concatenate([head, ids, tail], dtype=np.int32)


class DocumentRows:
  """One document a row: border + tokens in, tokens + border out."""

  def __init__(self, corpus: sources.Corpus, spans: sources.Spans, length: int, border: int):
    self._corpus, self._spans = corpus, spans
    self._border = np.array([border], np.int32)
    sizes_N = spans.stop_N - spans.start_N + 1
    if len(sizes_N) and sizes_N.max() > length:
      number = int(sizes_N.argmax())
      raise DataError(
        f"{corpus.name(int(spans.document_N[number]))}: {sizes_N[number]} tokens with its border, more than "
        f"sequence_length={length}; raise it, or data.packing=True"
      )

  def __len__(self) -> int:
    return len(self._spans.document_N)

  def read(self, index: int) -> Row:
    spans = self._spans
    document, start, stop = int(spans.document_N[index]), int(spans.start_N[index]), int(spans.stop_N[index])
    ids = self._corpus.tokens(document, start, stop).astype(np.int32)
    inputs, targets = np.concatenate([self._border, ids]), np.concatenate([ids, self._border])
    return Row(inputs, targets, np.ones(len(inputs), np.float32))


@dataclasses.dataclass(frozen=True)
class TaskRows:
  """One example of a task a row."""

  task: tasks.Task
  seed: int
  split: str

  def __len__(self) -> int:
    return self.task.count(self.split)

  def read(self, index: int) -> Row:
    example = self.task.example(self.seed, self.split, index)
    return Row(example.tokens, example.targets, example.weights)


@dataclasses.dataclass(frozen=True)
class FirstRows:
  """The first `count` rows of a split."""

  rows: Rows
  count: int

  def __len__(self) -> int:
    return self.count

  def read(self, index: int) -> Row:
    return self.rows.read(index)


def assemble(rows: list[tuple | None], length: int, ids_B: np.ndarray, vocabulary: types.Vocabulary) -> types.Batch:
  """A batch of rows padded to `length` (weight 0, segment 0, token 0, position 0); None is a row of padding only.

  A row is a Row, or its fields. Segments are told apart by borders in the tokens, which no text encodes to. Raises
  DataError for an id outside the vocabulary: on the device it would be clamped, or turn into NaN or a zero loss, in
  silence.
  """
  shape = (len(rows), length)
  tokens_BT, targets_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  weights_BT, real_BT = np.zeros(shape, np.float32), np.zeros(shape, bool)
  for number, row in enumerate(rows):
    if row is not None:
      row, size = Row(*row), len(row[0])
      tokens_BT[number, :size], targets_BT[number, :size], weights_BT[number, :size] = row[:3]
      real_BT[number, :size] = row.real
  for array in (tokens_BT, targets_BT):
    if array.size and not 0 <= array.min() <= array.max() < vocabulary.size:
      raise DataError(
        f"example {int(ids_B[np.argwhere((array < 0) | (array >= vocabulary.size))[0][0]])}: token ids reach from "
        f"{array.min()} to {array.max()}, but the vocabulary has {vocabulary.size}"
      )
  starts_BT = (tokens_BT == vocabulary.document) & real_BT
  starts_BT[:, :1] = real_BT[:, :1]
  place_T = np.arange(length, dtype=np.int32)
  begun_BT = np.maximum.accumulate(np.where(starts_BT, place_T, 0), axis=1)
  return types.Batch(
    tokens_BT=tokens_BT,
    targets_BT=targets_BT,
    weights_BT=weights_BT,
    segments_BT=np.where(real_BT, np.cumsum(starts_BT, axis=1, dtype=np.int32), 0).astype(np.int32),
    positions_BT=np.where(real_BT, place_T - begun_BT, 0).astype(np.int32),
    ids_B=ids_B,
  )
