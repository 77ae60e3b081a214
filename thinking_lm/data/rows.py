"""Rows: a split of a corpus, or of a task, cut into examples with random access; and batches of them."""

import dataclasses
from typing import Protocol

import numpy as np

from thinking_lm import types
from thinking_lm.data import sources, tasks
from thinking_lm.errors import DataError


class Rows(Protocol):
  """A split with random access."""

  def __len__(self) -> int:
    """Number of rows."""

  def read(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, targets and weights of one row: at most T of each, all of one length; the rest is padding."""


class PackedRows:
  """Documents laid out as one stream, each as border + tokens, cut into rows of T.

  Row i inputs stream[i T : (i + 1) T] and predicts the stream shifted by one; the stream's end predicts a border. So
  every token and border is an input once and a target once. Needs only the lengths of the documents.
  """

  def __init__(self, corpus: sources.Corpus, spans: sources.Spans, length: int, border: int):
    self._corpus, self._spans, self._length, self._border = corpus, spans, length, border
    self._ends_N = np.cumsum(spans.stop_N - spans.start_N + 1)

  def __len__(self) -> int:
    return -(-int(self._ends_N[-1]) // self._length) if len(self._ends_N) else 0

  def read(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    begin, total = index * self._length, int(self._ends_N[-1])
    end = min(begin + self._length, total)
    stream = self._slice(begin, min(end + 1, total))
    targets = stream[1:] if end < total else np.append(stream[1:], np.int32(self._border))
    return stream[: end - begin], targets, np.ones(end - begin, np.float32)

  def _slice(self, begin: int, end: int) -> np.ndarray:
    """int32 stream[begin:end]."""
    pieces = []
    number = int(np.searchsorted(self._ends_N, begin, side="right"))
    while begin < end:
      start, stop, last = (int(array[number]) for array in (self._spans.start_N, self._spans.stop_N, self._ends_N))
      offset = begin - (last - (stop - start) - 1)
      if offset == 0:
        pieces.append(np.array([self._border], np.int32))
        begin, offset = begin + 1, 1
      take = min(end, last) - begin
      if take > 0:
        first = start + offset - 1
        pieces.append(self._corpus.tokens(int(self._spans.document_N[number]), first, first + take))
      begin += take
      number += 1
    return np.concatenate(pieces, dtype=np.int32)


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

  def read(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    spans = self._spans
    document, start, stop = int(spans.document_N[index]), int(spans.start_N[index]), int(spans.stop_N[index])
    ids = self._corpus.tokens(document, start, stop).astype(np.int32)
    inputs, targets = np.concatenate([self._border, ids]), np.concatenate([ids, self._border])
    return inputs, targets, np.ones(len(inputs), np.float32)


@dataclasses.dataclass(frozen=True)
class TaskRows:
  """One example of a task a row."""

  task: tasks.Task
  seed: int
  split: str

  def __len__(self) -> int:
    return self.task.count(self.split)

  def read(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    example = self.task.example(self.seed, self.split, index)
    return example.tokens, example.targets, example.weights


@dataclasses.dataclass(frozen=True)
class FirstRows:
  """The first `count` rows of a split."""

  rows: Rows
  count: int

  def __len__(self) -> int:
    return self.count

  def read(self, index: int):
    return self.rows.read(index)


def assemble(rows: list[tuple], length: int, ids_B: np.ndarray, vocabulary: types.Vocabulary) -> types.Batch:
  """A batch of rows padded to `length` (weight 0, segment 0, token 0). None stands for a row of nothing but padding.

  Segments are told apart by borders in the tokens, which no text encodes to. Raises DataError for an id outside the
  vocabulary: on the device it would be clamped, or turn into NaN or a zero loss, in silence.
  """
  shape = (len(rows), length)
  tokens_BT, targets_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  weights_BT, real_BT = np.zeros(shape, np.float32), np.zeros(shape, bool)
  for number, row in enumerate(rows):
    if row is not None:
      size = len(row[0])
      tokens_BT[number, :size], targets_BT[number, :size], weights_BT[number, :size] = row
      real_BT[number, :size] = True
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
