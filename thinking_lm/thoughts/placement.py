"""WHERE thoughts go: batch -> Layout. No parameters, and causal: whether to think after t depends on tokens <= t only.

Each rule is a pure function that marks the tokens to think after; `place` turns the marks into a Layout of static
shape. Positions are counted per document, or per piece where a row cuts one, so that it is thought about in the same
way wherever it stands in a packed row. A cap counts over the whole row.
"""

import jax
import jax.numpy as jnp

from thinking_lm.types import Batch, Layout, Vocabulary


def none(batch: Batch, config, vocabulary: Vocabulary):
  """Nowhere."""
  del config, vocabulary
  return jnp.zeros(batch.tokens_BT.shape, bool)


def every(batch: Batch, config, vocabulary: Vocabulary):
  """After every real token."""
  del config, vocabulary
  return jnp.ones(batch.tokens_BT.shape, bool)


def stride(batch: Batch, config, vocabulary: Vocabulary):
  """After every `stride`-th token of a document."""
  del vocabulary
  return batch.positions_BT % config.stride == config.stride - 1


def sentence(batch: Batch, config, vocabulary: Vocabulary):
  """After a sentence end, by the classes of `Vocabulary.sentence_V`."""
  del config
  class_BT = jnp.asarray(vocabulary.sentence_V)[batch.tokens_BT]
  before_BT = jnp.pad(class_BT, ((0, 0), (1, 0)))[:, :-1]
  return (class_BT == 3) | ((class_BT == 2) & (before_BT == 1) & (batch.positions_BT > 0))


def explicit(batch: Batch, config, vocabulary: Vocabulary):
  """After the configured positions of each document."""
  del vocabulary
  return jnp.isin(batch.positions_BT, jnp.asarray(config.positions, jnp.int32))


PLACEMENTS = dict(none=none, every=every, stride=stride, sentence=sentence, explicit=explicit)


def capacity(config, T: int) -> int:
  """N, how many anchors a row of T tokens has room for: the most that the placement can mark, or the cap."""
  if config.length == 0:
    return 0
  most = T
  if config.placement == "stride":
    most = T // config.stride
  if config.placement == "explicit":  # a document of p + 1 tokens or more reaches its position p
    most = max(T * (i + 1) // (p + 1) for i, p in enumerate(sorted(config.positions)))
  return min(most, T, config.cap or most)


def blocks(config, T: int, N: int, aligned: int) -> tuple[int, int]:
  """(C, R): R blocks of at most C real tokens hold any row, where a block ends at an anchor or when it is full.

  In general R = N + T // C + 1: at most N blocks end at an anchor, the others but the last consume C tokens each. With
  a stride k, 2k - 1 tokens hold the rest of one document and the first k of the next, so that T // k + 1 blocks do.
  Where k divides `aligned` (see `place`), every anchor is the last of k tokens at a multiple of k: T / k blocks of k.
  """
  k = config.stride
  if N == 0:
    return T, 1
  if config.placement == "stride" and not config.cap:
    return (k, -(-T // k)) if aligned % k == 0 else (2 * k - 1, T // k + 1)
  C = -(-T // N)
  return C, T if C == 1 else min(T, N + T // C + 1)


def place(batch: Batch, config, vocabulary: Vocabulary, aligned: int = 1) -> Layout:
  """The layout of a batch: the first N marked tokens of each row. Padding is never thought about.

  Args:
    aligned: what the data promises: documents start at multiples of so many tokens of their row. 1 promises nothing; 0
      is one document a row, which starts at 0. The blocks are smaller where a stride divides it.
  """
  T = batch.tokens_BT.shape[1]
  N = capacity(config, T)
  marked_BT = PLACEMENTS[config.placement](batch, config, vocabulary) & (batch.segments_BT > 0)
  index_BT = jnp.where(marked_BT, jnp.arange(T), T)
  C, R = blocks(config, T, N, aligned)
  return Layout(anchors_BN=jax.lax.sort(index_BT, dimension=1)[:, :N].astype(jnp.int32), block=C, blocks=R)
