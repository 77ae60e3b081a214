"""Aligned packing: documents start at multiples of `align`, with padding in between, and nothing is lost or doubled."""

import dataclasses
import itertools

import numpy as np
import pytest

from tests.data.pipeline_test import BORDER, LENGTHS, corpus, data_of, joined
from thinking_lm.data import pipeline, sources
from thinking_lm.data.pipeline import DataConfig
from thinking_lm.data.rows import PackedRows

NAMES = ("tokens_BT", "targets_BT", "weights_BT", "segments_BT", "positions_BT")


def batches_of(lengths, length, align):
  """All rows of these documents, packed."""
  text = corpus(lengths)
  rows = PackedRows(text, sources.whole(text, np.ones(len(lengths), bool)), length, BORDER, align)
  return list(data_of(rows, length, align=align).evaluation_batches("train", batch_size=3))


def oracle(lengths, length, align):
  """Rows place by place with Python lists: what each field of a batch must be."""
  text, places, padding = corpus(lengths), [], (0, 0, 0.0, None)
  for number, size in enumerate(lengths):
    places += [padding] * (-len(places) % align)
    ids = [BORDER, *text.tokens(number, 0, size).tolist(), BORDER]
    places += [(token, target, 1.0, number) for token, target in itertools.pairwise(ids)]
  places += [padding] * (-len(places) % (3 * length))
  rows = {name: [] for name in NAMES}
  for begin in range(0, len(places), length):
    tokens, targets, weights, documents = zip(*places[begin : begin + length], strict=True)
    here = sorted(set(documents) - {None})
    rows["tokens_BT"].append(list(tokens))
    rows["targets_BT"].append(list(targets))
    rows["weights_BT"].append(list(weights))
    rows["segments_BT"].append([0 if number is None else here.index(number) + 1 for number in documents])
    rows["positions_BT"].append([0 if n is None else t - documents.index(n) for t, n in enumerate(documents)])
  return rows


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("length", "align"), [(1, 1), (8, 1), (8, 2), (8, 8), (9, 3), (64, 4), (64, 32)])
def test_aligned_rows_equal_those_built_place_by_place(lengths, length, align):
  batches = batches_of(LENGTHS[lengths], length, align)
  for name, expected in oracle(LENGTHS[lengths], length, align).items():
    assert joined(batches, name).tolist() == expected, name


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("align", [2, 4, 16])
def test_alignment_moves_no_token_and_no_border(lengths, align):
  """In order, every input with its target, exactly once: as without alignment."""

  def pairs(align):
    batches = batches_of(LENGTHS[lengths], 16, align)
    real_BT = joined(batches, "weights_BT") == 1
    assert (real_BT == (joined(batches, "segments_BT") > 0)).all()
    return [joined(batches, name)[real_BT].tolist() for name in NAMES[:2]]

  tokens, targets = pairs(align)
  assert [tokens, targets] == pairs(1)
  assert len(tokens) == sum(LENGTHS[lengths]) + len(LENGTHS[lengths]) and targets == [*tokens[1:], BORDER]


@pytest.mark.parametrize("align", [2, 8])
def test_aligned_places_within_rows(align):
  """What placements rely on: position modulo align is place modulo align; and no row begins with padding."""
  lengths = np.random.default_rng(1).integers(1, 40, 200)
  text = corpus(lengths)
  rows = PackedRows(text, sources.whole(text, np.ones(len(lengths), bool)), 32, BORDER, align)
  data = data_of(rows, 32, align=align)
  batches = list(data.evaluation_batches("train", batch_size=1))
  assert len(batches) == len(rows)
  segments_BT = joined(batches, "segments_BT")
  assert (segments_BT[:, 0] == 1).all()
  between_BT = (segments_BT == 0) & (np.flip(np.maximum.accumulate(np.flip(segments_BT, 1), 1), 1) > 0)
  ends_B = (segments_BT[:, -1] == 0) & (np.arange(len(batches)) < len(batches) - 1)
  assert between_BT.any() and ends_B.any()  # there is padding within rows, and up to the very end of some
  apart_BT = (joined(batches, "positions_BT") - np.arange(32)) % align
  assert not apart_BT[segments_BT > 0].any()


def test_alignment_of_every_source_that_packs():
  """The embedded corpus; tests/data/prepare_test.py compares prepared corpora with text."""
  plain = pipeline.build(DataConfig(sequence_length=64))
  aligned = pipeline.build(DataConfig(sequence_length=64, align=16))
  assert plain.digest != aligned.digest and (plain.aligned, aligned.aligned) == (1, 16)
  texts, borders = [], []
  for data in (plain, aligned):
    batches = list(data.evaluation_batches("validation", batch_size=32))
    tokens_BT = joined(batches, "tokens_BT")
    texts.append(tokens_BT[joined(batches, "weights_BT") > 0].tolist())
    borders.append(np.argwhere(tokens_BT == BORDER)[:, 1] % 16)
  assert texts[0] == texts[1] and texts[0][0] == BORDER
  assert borders[0].any() and not borders[1].any()


def test_what_data_promises_and_which_rows_cannot_be_aligned():
  base = DataConfig(sequence_length=12, align=8)
  assert base.faults() == [
    "sequence_length=12 is not a multiple of align=8: a row could start within padding; the next is 16, and align=1 "
    "allows any"
  ]
  for changes, aligned in ((dict(sequence_length=16), 8), (dict(align=1), 1), (dict(align=4), 4),
                           (dict(packing=False), 0), (dict(source="task", sequence_length=0), 0)):  # fmt: skip
    options = dataclasses.replace(base, **changes)
    assert options.faults() == [] and options.aligned == aligned
