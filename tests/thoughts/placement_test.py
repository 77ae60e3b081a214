"""Where thoughts go: rules spelled out in loops, bounds that hold for any packed row, and no look into the future."""

import numpy as np
import pytest

from tests.model import problem
from tests.slow import leaving
from thinking_lm.thoughts import topology
from thinking_lm.thoughts.placement import PLACEMENTS, blocks, capacity, markable, place
from thinking_lm.thoughts.spec import ThoughtConfig

VOCABULARY = problem.VOCABULARY
RULES = [
  ("none", {}),
  ("every", {}),
  ("stride", dict(stride=1)),
  ("stride", dict(stride=2)),
  ("stride", dict(stride=3)),
  ("stride", dict(stride=50)),
  ("sentence", {}),
  ("explicit", dict(positions=(0, 3))),
  ("explicit", dict(positions=(6, 1, 2))),
]


def random_rows(seed, B, T, packed=True):
  """Rows of documents of any lengths, with padding at the end of some."""
  rng = np.random.default_rng(seed)
  lengths = []
  for _ in range(B):
    room, row = rng.integers(1, T + 1), []
    while packed and rng.random() < 0.9 and sum(row) < room:
      row.append(rng.integers(1, rng.integers(2, 8)))
    row.append(room)
    total = np.cumsum(row)
    lengths.append([n for n, end in zip(row, total, strict=True) if end <= room] or [room])
  return problem.pack(rng.integers(0, problem.V, (B, T)), lengths, seed)


@pytest.mark.parametrize("packed", leaving([True, False], [False]))
@pytest.mark.parametrize("bounds", [{}, dict(cap=2), dict(room=2), dict(cap=1, room=3)], ids=str)
@pytest.mark.parametrize("placement,options", RULES)
def test_marks_and_slots_of_random_rows(placement, options, bounds, packed):
  # Every mark is an anchor, every token has one slot of its own, and every thought comes right after its anchor. The
  # cap counts over each document; what the row has no room for is counted.
  for seed, T in enumerate((1, 5, 13)):
    batch = random_rows(seed, 60, T, packed)
    config = ThoughtConfig(placement=placement, length=2, **options, **bounds)
    layout = place(batch, config, VOCABULARY, aligned=int(packed))
    anchors_BN = np.asarray(layout.anchors_BN)
    N = anchors_BN.shape[1]
    assert capacity(config, T, int(packed)) == N
    dropped_B = np.zeros(60, int) if layout.dropped_B is None else np.asarray(layout.dropped_B)
    for b in range(60):
      everywhere = problem.marks(batch, b, placement, options | dict(cap=config.cap))
      marked = problem.marks(batch, b, placement, options | bounds)
      assert anchors_BN[b].tolist() == marked + [T] * (N - len(marked))
      assert dropped_B[b] == len(everywhere) - len(marked)
    assert (layout.dropped_B is None) == (not config.room or markable(config, T, int(packed)) <= config.room)
    if anchors_BN.shape[1]:
      check_stream(batch, layout, J=2)


def check_stream(batch, layout, J):
  stream = topology.persistent(batch, layout, J, "advance")
  B, T = batch.tokens_BT.shape
  C, W, S = layout.block, layout.block + J, layout.blocks * (layout.block + J)
  if layout.cuts is not None:  # no empty slots: blocks are of different sizes
    S = T + J * len(layout.cuts)
  slot_BT, thought_BN, token_BS = (np.asarray(a) for a in (stream.slot_BT, stream.thought_BN, stream.token_BS))
  assert token_BS.shape == (B, S)
  assert slot_BT.min() >= 0 and slot_BT.max() < S
  assert (np.diff(slot_BT, axis=1) > 0).all() and (layout.cuts is not None or (slot_BT % W < C).all())
  np.testing.assert_array_equal(np.take_along_axis(token_BS, slot_BT, 1), np.tile(np.arange(T), (B, 1)))
  assert ((token_BS < T).sum(axis=1) == T).all()
  for b in range(B):
    for n, anchor in enumerate(np.asarray(layout.anchors_BN)[b]):
      if anchor == T:
        assert thought_BN[b, n] == S
        continue
      if layout.cuts is None:
        assert thought_BN[b, n] // W == slot_BT[b, anchor] // W and thought_BN[b, n] % W == C
      else:
        assert thought_BN[b, n] == slot_BT[b, anchor] + 1
      assert np.asarray(stream.anchor_BS)[b, thought_BN[b, n] : thought_BN[b, n] + J].tolist() == [n] * J
      after = slot_BT[b, anchor + 1] if anchor + 1 < T else S
      assert slot_BT[b, anchor] < thought_BN[b, n] and thought_BN[b, n] + J - 1 < after


def test_bounds_are_not_generous():
  # A stride needs no more than a block for each full stride and one for the rest.
  assert blocks(ThoughtConfig(placement="stride", stride=4, length=2), 32, 8, aligned=0) == (4, 8)
  assert blocks(ThoughtConfig(placement="stride", stride=4, length=2), 32, 8, aligned=1) == (7, 9)
  assert blocks(ThoughtConfig(placement="every"), 32, 32, aligned=1) == (1, 32)
  N = lambda T, aligned, **options: capacity(ThoughtConfig(length=1, **options), T, aligned)
  assert N(33, 1, placement="stride", stride=4) == 8
  assert N(32, 1, placement="explicit", positions=(0, 31)) == 32  # one-token documents
  assert N(32, 1, placement="explicit", positions=(15, 31)) == 2
  assert N(32, 0, placement="explicit", positions=(0, 31)) == 2
  assert N(32, 1, placement="explicit", positions=(15, 3, 31), cap=1) == 8
  # A cap of 3: one document a row; documents that start at multiples of 8; and such of one token each.
  assert [N(32, aligned, placement="every", cap=3) for aligned in (0, 8, 1)] == [3, 12, 32]
  assert [N(32, aligned, placement="every", cap=3, room=5) for aligned in (0, 8, 1)] == [3, 5, 5]
  # Few thoughts in a row of long strides: blocks of k are fewer slots than blocks for N anchors anywhere.
  assert blocks(ThoughtConfig(placement="stride", stride=4, cap=2, length=1), 32, 2, aligned=0) == (4, 8)
  assert blocks(ThoughtConfig(placement="stride", stride=4, cap=1, length=9), 32, 1, aligned=0) == (32, 2)
  assert blocks(ThoughtConfig(placement="sentence", room=8), 32, 8, aligned=1) == (4, 14)


@pytest.mark.parametrize("placement,options", RULES)
def test_whether_to_think_after_a_token_never_depends_on_later_ones(placement, options):
  config = ThoughtConfig(placement=placement, length=1, cap=4, **options)
  batch = random_rows(0, 60, 12)
  other = np.random.default_rng(1).integers(0, problem.V, batch.tokens_BT.shape)
  mark = lambda tokens: np.asarray(PLACEMENTS[placement](batch.replace(tokens_BT=tokens), config, VOCABULARY))
  before = mark(batch.tokens_BT)
  for t in range(12):
    changed = batch.tokens_BT.copy()
    changed[:, t + 1 :] = other[:, t + 1 :]
    np.testing.assert_array_equal(mark(changed)[:, : t + 1], before[:, : t + 1])


@pytest.mark.parametrize("placement,options", RULES)
def test_a_document_is_marked_the_same_wherever_it_stands(placement, options):
  document = [3, 1, 2, 0, 1, 2, 3]
  tokens = np.array([document + [0] * 5, [1, 1, 1, *document, 2, 2], [2, *document, 0, 0, 0, 0]], np.int32)
  batch = problem.pack(tokens, [(7,), (3, 7), (1, 7, 4)])
  config = ThoughtConfig(placement=placement, length=1, **options)
  marked = np.asarray(PLACEMENTS[placement](batch, config, VOCABULARY))
  np.testing.assert_array_equal(marked[0, :7], marked[1, 3:10])
  np.testing.assert_array_equal(marked[0, :7], marked[2, 1:8])


def test_padding_is_never_thought_about():
  batch = problem.pack(np.full((2, 6), 3), [(2,), (1, 2)])
  for placement, options in RULES:
    if placement != "none":
      config = ThoughtConfig(placement=placement, length=1, **options)
      for row, end in zip(np.asarray(place(batch, config, VOCABULARY).anchors_BN), (2, 3), strict=True):
        assert all(anchor < end or anchor == 6 for anchor in row)


def test_sentences_end_at_a_full_stop_and_a_space_of_the_same_document():
  batch = problem.pack([[1, 2, 2, 3, 1, 1, 2, 0], [0, 1, 2, 1, 2, 3, 0, 0]], [(8,), (4, 3)])
  config = ThoughtConfig(placement="sentence", room=4, length=1)
  assert np.asarray(place(batch, config, VOCABULARY).anchors_BN).tolist() == [[1, 3, 6, 8], [2, 5, 8, 8]]
