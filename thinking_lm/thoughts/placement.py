"""WHERE thoughts go: batch -> Layout. No parameters, and causal: whether to think after t depends on tokens <= t only.

Each rule is a pure function that marks the tokens to think after; `place` turns the marks into a Layout of static
shape. Positions are counted per document, so that a document is thought about in the same way wherever it stands in a
packed row, and in generation.
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


def anchors(config, T: int) -> int:
  """N, the number of anchors a row of T tokens has room for."""
  if config.length == 0:
    return 0
  natural = T // config.stride if config.placement == "stride" else T
  if config.placement == "explicit" and len(config.positions) == 1:
    natural = T // (config.positions[0] + 1)  # one thought a document, which has at least that many tokens
  return min(natural, config.cap or natural)


def place(batch: Batch, config, vocabulary: Vocabulary) -> Layout:
  """The layout of a batch: the first N marked tokens of each row. Padding is never thought about."""
  T = batch.tokens_BT.shape[1]
  N = anchors(config, T)
  marked_BT = PLACEMENTS[config.placement](batch, config, vocabulary) & (batch.segments_BT > 0)
  index_BT = jnp.where(marked_BT, jnp.arange(T), T)
  return Layout(anchors_BN=jax.lax.sort(index_BT, dimension=1)[:, :N].astype(jnp.int32))
