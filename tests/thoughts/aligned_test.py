"""A promise of the data makes the persistent stream smaller: with documents at multiples of k, blocks of k are full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import text
from thinking_lm import experiment
from thinking_lm.analysis.flops import ledger
from thinking_lm.data import sources, tokenizer
from thinking_lm.data.rows import DocumentRows, PackedRows, assemble
from thinking_lm.model.decoder import ModelConfig
from thinking_lm.thoughts import topology
from thinking_lm.thoughts.placement import place
from thinking_lm.thoughts.spec import ThoughtConfig

BYTES = tokenizer.ByteTokenizer()
J = 2


def rows_of(aligned, T):
  """A batch of all rows of random documents, which keeps the promise `aligned`."""
  random, rows = np.random.default_rng(0), []
  for most in (3, 12, 30, 60):
    sizes = random.integers(1, (most if aligned else min(most, T - 1)) + 1, 20)
    texts = [sources.Document(str(number), random.bytes(int(size))) for number, size in enumerate(sizes)]
    corpus = sources.MemoryCorpus(texts, BYTES, 1)
    spans, border = sources.whole(corpus, np.ones(len(sizes), bool)), BYTES.vocabulary.document
    made = PackedRows(corpus, spans, T, border, aligned) if aligned else DocumentRows(corpus, spans, T, border)
    rows += [made.read(index) for index in range(len(made))]
  batch = assemble(rows, T, np.arange(len(rows), dtype=np.uint32), BYTES.vocabulary)
  return jax.tree.map(jnp.asarray, batch)


@pytest.mark.parametrize(
  ("k", "aligned", "T", "blocks"),
  [
    (4, 0, 32, (4, 8)),
    (4, 0, 30, (4, 8)),
    (4, 4, 32, (4, 8)),
    (4, 8, 32, (4, 8)),
    (3, 3, 33, (3, 11)),
    (8, 8, 8, (8, 1)),
    (1, 1, 13, (1, 13)),
    (4, 1, 32, (7, 9)),
    (4, 1, 30, (7, 8)),
    (8, 4, 32, (8, 8)),
  ],
)
def test_every_token_has_a_slot_and_every_mark_a_thought(k, aligned, T, blocks):
  batch = rows_of(aligned, T)
  config = ThoughtConfig(placement="stride", stride=k, length=J)
  lay_out = lambda batch: place(batch, config, BYTES.vocabulary, aligned)
  layout = jax.jit(lay_out)(batch)
  (C, R), N = blocks, layout.anchors_BN.shape[1]
  W, S = C + J, R * (C + J)
  assert (layout.block, layout.blocks) == blocks
  stream = jax.device_get(jax.jit(lambda batch: topology.persistent(batch, lay_out(batch), J, "advance"))(batch))
  anchors_BN = np.asarray(layout.anchors_BN)
  for b, (segments, positions) in enumerate(zip(np.asarray(batch.segments_BT), np.asarray(batch.positions_BT),
                                                strict=True)):  # fmt: skip
    marked = [t for t in range(T) if segments[t] and positions[t] % k == k - 1]
    assert anchors_BN[b].tolist() == marked + [T] * (N - len(marked))
    slots = stream.slot_BT[b]
    assert (np.diff(slots) > 0).all() and slots[0] >= 0 and slots[-1] < S and (slots % W < C).all()
    assert stream.token_BS[b][slots].tolist() == list(range(T))
    assert (stream.token_BS[b] < T).sum() == T
    thoughts = stream.thought_BN[b][: len(marked)]
    assert (thoughts // W == slots[marked] // W).all() and (thoughts % W == C).all()
    assert (stream.thought_BN[b][len(marked) :] == S).all()
    following = [t + 1 for t in marked if t + 1 < T]
    assert (slots[following] > thoughts[: len(following)]).all()
    if aligned % k == 0:
      assert (slots[marked] % W == k - 1).all()  # the block of a thought is full


@pytest.mark.parametrize("bounds", [dict(cap=1), dict(cap=2, room=5)], ids=str)
@pytest.mark.parametrize(("k", "aligned"), [(4, 0), (4, 8), (4, 1)])
def test_a_capped_stride_has_a_slot_for_every_token_too(k, aligned, bounds):
  batch = rows_of(aligned, 32)
  config = ThoughtConfig(placement="stride", stride=k, length=J, **bounds)
  layout = jax.jit(lambda batch: place(batch, config, BYTES.vocabulary, aligned))(batch)
  stream = jax.jit(
    lambda batch: topology.persistent(batch, place(batch, config, BYTES.vocabulary, aligned), J, "anchor")
  )
  stream, W = jax.device_get(stream(batch)), layout.block + J
  assert layout.blocks * W <= (8 * (4 + J) if aligned % k == 0 else 9 * (7 + J))
  assert (np.diff(stream.slot_BT) > 0).all() and stream.slot_BT.max() < layout.blocks * W
  assert (stream.slot_BT % W < layout.block).all()


def test_the_text_config_needs_as_many_slots_as_it_has_tokens_and_thoughts():
  """And the ledger counts the slots that the layout has."""
  built = experiment.build(experiment.parse(text.get_config("latent")))
  batch = jax.tree.map(jnp.asarray, next(built.data.batches("train", global_batch=2)))
  layout = built.place(None, batch)
  assert (layout.block, layout.blocks) == (8, 16)
  count = lambda aligned: ledger(ModelConfig(), 257, built.config.thought, 128, aligned=aligned, gradient=False)
  assert count(8) == count(0) == count(16)
  assert count(1).total > 1.5 * count(8).total
