import jax
import jax.numpy as jnp
import numpy as np
import pytest

from thinking_lm.evaluation.controls import CONTROLS, Source, counted, latest
from thinking_lm.types import Batch, Layout, Thoughts

PAUSE = -7.0


def label(rows, G, N):
  """100 row + 10 sample + anchor, at each thought [rows, G, N]."""
  return np.asarray(rows)[:, None, None] * 100 + np.arange(G)[:, None] * 10 + np.arange(N)


def thoughts(labels_BGN):
  """Thoughts that carry their label in each of two think tokens of width 3."""
  labels = np.asarray(labels_BGN, np.float32)
  return Thoughts(
    jnp.asarray(np.broadcast_to(labels[..., None, None], (*labels.shape, 2, 3))),
    jnp.asarray(np.broadcast_to(labels[..., None], (*labels.shape, 2)), jnp.int32),
  )


def source(rows, numbers, before_number=0, N=3, G=2):
  """Rows with so many valid anchors each; the thoughts before the batch are those of row 9."""
  valid_BN = np.arange(N) < np.asarray(numbers)[:, None]
  before_N = np.arange(N) < before_number
  return Source(
    thoughts(label(rows, G, N)), jnp.asarray(valid_BN), jnp.full(3, PAUSE), thoughts(label([9], G, N)), before_N
  )


def labels(found: Thoughts):
  """The label of each thought; both of its tokens, all of its width and its ids must agree."""
  inputs, tokens = np.asarray(found.inputs_BGNJD), np.asarray(found.tokens_BGNJ)
  assert (inputs == inputs[..., :1, :1]).all() and (tokens == inputs[..., 0]).all()
  return inputs[..., 0, 0]


def test_own_thoughts_stay():
  found, changed_BN = CONTROLS["own"](source([1, 2], [3, 1]))
  np.testing.assert_array_equal(labels(found), label([1, 2], 2, 3))
  assert changed_BN.tolist() == [[True, True, True], [True, False, False]]


def test_pause_is_one_embedding_everywhere():
  found, changed_BN = CONTROLS["pause"](source([1, 2], [3, 1]))
  assert (found.inputs_BGNJD == PAUSE).all() and (found.tokens_BGNJ == -1).all()
  assert found.inputs_BGNJD.shape == (2, 2, 3, 2, 3)
  assert changed_BN.tolist() == [[True, True, True], [True, False, False]]


def test_shuffled_gives_the_thought_of_the_nearest_earlier_row_at_the_same_anchor():
  found, changed_BN = CONTROLS["shuffled"](source([1, 2, 3, 4], [3, 2, 0, 3], before_number=2))
  assert changed_BN.tolist() == [[True, True, False], [True, True, False], [False] * 3, [True, True, True]]
  assert labels(found)[:, 0].tolist()[:2] == [[900, 901, 102], [100, 101, 202]]
  assert labels(found)[3].tolist() == [[200, 201, 102], [210, 211, 112]]  # not of row 3, which is padding


def test_shuffled_has_nothing_for_the_first_row():
  found, changed_BN = CONTROLS["shuffled"](source([1], [3]))
  assert not changed_BN.any()
  np.testing.assert_array_equal(labels(found), label([1], 2, 3))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_shuffled_does_not_depend_on_how_rows_are_batched(size):
  numbers = np.random.default_rng(0).integers(0, 4, size=10)
  whole, changed = CONTROLS["shuffled"](source(range(10), numbers))
  before, before_N = thoughts(np.zeros((1, 2, 3))), np.zeros(3, bool)
  for first in range(0, 10, size):
    rows = range(first, first + size)
    part = source(rows, numbers[first : first + size])._replace(before=before, before_N=before_N)
    found, changed_BN = CONTROLS["shuffled"](part)
    np.testing.assert_array_equal(changed_BN, changed[first : first + size])
    np.testing.assert_array_equal(labels(found), labels(whole)[first : first + size])
    before, before_N = latest(part)
  donors = labels(whole) // 100
  own = np.arange(10)[:, None, None]
  changed = np.broadcast_to(np.asarray(changed)[:, None], donors.shape)
  assert (donors[changed] < np.broadcast_to(own, donors.shape)[changed]).all() and changed.any()


def test_moved_gives_the_thought_of_the_anchor_before_and_nothing_wraps():
  found, changed_BN = CONTROLS["moved"](source([1, 2], [3, 1]))
  assert changed_BN.tolist() == [[False, True, True], [False, False, False]]
  assert labels(found).tolist() == [[[100, 100, 101], [110, 110, 111]], [[200, 201, 202], [210, 211, 212]]]


def counted_by_hand(segments_T, anchors, changed, topology):
  """The definition, target by target."""
  found = []
  for t, segment in enumerate(segments_T):
    if topology == "private":
      found.append(changed[anchors.index(t)] if t in anchors else True)
    else:
      seen = [n for n, a in enumerate(anchors) if a <= t and segments_T[a] == segment]
      found.append(changed[seen[-1]] if seen else True)
  return found


@pytest.mark.parametrize("topology", ["private", "persistent"])
def test_targets_behind_an_unchanged_thought_do_not_count(topology):
  random = np.random.default_rng(1)
  segments_BT = np.sort(random.integers(1, 4, size=(20, 9)), axis=1)
  positions_BT = np.array([[int((row[:t] == row[t]).sum()) for t in range(9)] for row in segments_BT])
  anchors = [sorted(random.choice(9, size=random.integers(0, 6), replace=False).tolist()) for _ in range(20)]
  changed_BN = random.random((20, 5)) < 0.5
  anchors_BN = np.array([row + [9] * (5 - len(row)) for row in anchors])
  dummy = jnp.zeros((20, 9), jnp.int32)
  batch = Batch(dummy, dummy, dummy, jnp.asarray(segments_BT), jnp.asarray(positions_BT), jnp.arange(20))
  changed_BN &= anchors_BN < 9
  found = jax.jit(counted, static_argnums=3)(batch, Layout(jnp.asarray(anchors_BN), 1, 1), changed_BN, topology)
  for row in range(20):
    wanted = counted_by_hand(segments_BT[row].tolist(), anchors[row], changed_BN[row].tolist(), topology)
    assert found[row].tolist() == wanted
