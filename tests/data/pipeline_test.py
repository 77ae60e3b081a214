"""Rows and their order: packing conserves tokens, and the order is a function of the step alone."""

import dataclasses
import itertools
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

from thinking_lm.data import pipeline, sources, tasks, tokenizer
from thinking_lm.data.pipeline import DataConfig
from thinking_lm.data.rows import DocumentRows, PackedRows
from thinking_lm.errors import ConfigError, DataError
from thinking_lm.types import Batch, Vocabulary

BORDER = 256


def corpus(lengths, seed=0):
  """An in-memory corpus of random bytes with documents of these lengths."""
  random = np.random.default_rng(seed)
  documents = [sources.Document(str(number), random.bytes(length)) for number, length in enumerate(lengths)]
  return sources.MemoryCorpus(documents, tokenizer.ByteTokenizer(), 100)


def data_of(rows, length, **options):
  """Data around rows, as `build` would make it."""
  encoder = tokenizer.ByteTokenizer()
  options = DataConfig(sequence_length=length, **options)
  return pipeline.Data(options, encoder.vocabulary, encoder, "", length, None, {}, dict(train=rows))


def packed(lengths, length, **options):
  """Data whose train split is these documents, packed."""
  text = corpus(lengths)
  return data_of(PackedRows(text, sources.whole(text, np.ones(len(lengths), bool)), length, BORDER), length,
                 **options)  # fmt: skip


class Numbered:
  """Rows whose only token is their number."""

  def __init__(self, count):
    self.count = count

  def __len__(self):
    return self.count

  def read(self, index):
    return np.array([index], np.int32), np.array([index], np.int32), np.ones(1, np.float32)


def numbered(count, **options):
  none = np.zeros(count + 1, np.int8)
  vocabulary = Vocabulary(count + 1, count, none, none)
  return dataclasses.replace(data_of(Numbered(count), 1, **options), vocabulary=vocabulary)


def take(batches, count):
  return list(itertools.islice(batches, count))


def numbers(batches):
  return np.concatenate([batch.tokens_BT[:, 0] for batch in batches]).tolist()


def joined(batches, name):
  parts = [getattr(batch, name) for batch in batches]
  return None if parts[0] is None else np.concatenate(parts)  # need_BT: nobody asked for it


def woven(parts, name):
  """The rows of a batch that hosts took in turns."""
  leaves = [getattr(part, name) for part in parts]
  return None if leaves[0] is None else np.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:])


LENGTHS = {
  "many short": [1, 2, 1, 5, 3, 1, 1, 8, 2, 7],
  "around a row": [6, 7, 8, 9, 15, 16, 17],
  "one long": [1000],
  "one": [1],
  "long between short": [1, 300, 1, 1, 77],
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("length", [1, 2, 8, 64])
def test_packing_conserves_every_token(lengths, length):
  """Against the stream built with Python lists: inputs, targets, weights, segments, positions."""
  lengths = LENGTHS[lengths]
  text = corpus(lengths)
  stream, document, place = [], [], []
  for number, size in enumerate(lengths):
    stream += [BORDER, *text.tokens(number, 0, size).tolist()]
    document += [number] * (size + 1)
    place += range(size + 1)
  data = packed(lengths, length)
  batches = list(data.evaluation_batches("train", batch_size=3))
  rows = -(-len(stream) // length)
  assert data.rows("train") == rows
  flat = {name: joined(batches, name).reshape(-1) for name in ("tokens_BT", "targets_BT", "weights_BT", "segments_BT")}
  assert flat["tokens_BT"][: len(stream)].tolist() == stream
  assert flat["targets_BT"][: len(stream)].tolist() == [*stream[1:], BORDER]
  assert flat["weights_BT"].tolist() == [1.0] * len(stream) + [0.0] * (len(flat["weights_BT"]) - len(stream))
  assert not flat["segments_BT"][len(stream) :].any()
  positions = joined(batches, "positions_BT").reshape(-1)
  for begin in range(0, len(stream), length):
    end = min(begin + length, len(stream))
    first = [document.index(number, begin) for number in document[begin:end]]
    assert positions[begin:end].tolist() == [t - start for t, start in zip(range(begin, end), first, strict=True)]
    assert flat["segments_BT"][begin:end].tolist() == [number - document[begin] + 1 for number in document[begin:end]]


def test_packing_a_long_document_among_short_ones_by_random_access():
  data = packed([1, 10**6, 3], 1000)
  text = corpus([1, 10**6, 3])
  row = data.splits["train"].read(500)
  assert row[0].tolist() == text.tokens(1, 500 * 1000 - 3, 501 * 1000 - 3).tolist()


def test_one_document_a_row():
  text = corpus([3, 1, 7])
  rows = DocumentRows(text, sources.whole(text, np.array([True, False, True])), 8, BORDER)
  (batch,) = data_of(rows, 8).evaluation_batches("train", batch_size=2)
  for row, number, size in ((0, 0, 3), (1, 2, 7)):
    ids = text.tokens(number, 0, size).tolist()
    assert batch.tokens_BT[row].tolist() == [BORDER, *ids] + [0] * (7 - size)
    assert batch.targets_BT[row].tolist() == [*ids, BORDER] + [0] * (7 - size)
    for name, real in (("weights_BT", [1.0] * (size + 1)), ("segments_BT", [1] * (size + 1)),
                       ("positions_BT", list(range(size + 1)))):  # fmt: skip
      assert getattr(batch, name)[row].tolist() == real + [0] * (7 - size)


def test_a_document_longer_than_a_row_is_refused_by_name(tmp_path):
  (tmp_path / "fits").write_bytes(b"x" * 7)
  data = pipeline.build(DataConfig(source="text", input=f"{tmp_path}/*", sequence_length=8, packing=False,
                                   validation_fraction=0.0, test_fraction=0.0))  # fmt: skip
  assert data.rows("train") == 1
  (tmp_path / "long").write_bytes(b"x" * 8)
  message = "/long: 9 tokens with its border, more than sequence_length=8; raise it, or data.packing=True"
  with pytest.raises(DataError, match=message):
    pipeline.build(dataclasses.replace(data.options))


def test_batches_are_what_the_glossary_says():
  data = packed([50] * 20, 16)
  batch = next(data.batches("train", global_batch=4, start_step=3))
  types_ = dict(tokens_BT=np.int32, targets_BT=np.int32, weights_BT=np.float32, segments_BT=np.int32,
                positions_BT=np.int32, ids_B=np.uint32)  # fmt: skip
  assert isinstance(batch, Batch)
  for name, dtype in types_.items():
    array = getattr(batch, name)
    assert type(array) is np.ndarray and array.dtype == dtype
    assert array.shape == ((4,) if name == "ids_B" else (4, 16))
  assert batch.ids_B.tolist() == [12, 13, 14, 15]
  late = next(data.batches("train", global_batch=4, start_step=2**30 + 20000))
  assert late.ids_B.tolist() == [80000, 80001, 80002, 80003]


def test_epochs_are_exact_and_differ():
  """10 rows in batches of 4: epoch borders fall inside batches, and no row is missed or repeated."""
  order = numbers(take(numbered(10).batches("train", global_batch=4), 15))
  epochs = [order[begin : begin + 10] for begin in range(0, 60, 10)]
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert len(set(map(tuple, epochs))) == 6


def test_one_row_is_enough_for_a_batch_of_one():
  assert numbers(take(numbered(1).batches("train", global_batch=1), 3)) == [0, 0, 0]


@pytest.mark.parametrize("start", [0, 1, 4, 5, 7])
def test_any_step_is_replayed_by_a_fresh_iterator(start):
  straight = take(numbered(10).batches("train", global_batch=2), 12)
  fresh = take(numbered(10).batches("train", global_batch=2, start_step=start), 12 - start)
  assert numbers(fresh) == numbers(straight[start:])
  np.testing.assert_array_equal(joined(fresh, "ids_B"), joined(straight[start:], "ids_B"))


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_order_is_the_same_for_any_number_of_hosts(hosts):
  """And a run may go on with another number: the second half is read by `hosts` hosts."""
  data = packed([30] * 40, 8)
  one = take(data.batches("train", global_batch=8), 40)
  shares = [
    take(data.batches("train", global_batch=8, start_step=20, share=range(host, 8, hosts)), 20) for host in range(hosts)
  ]
  for step, share in enumerate(zip(*shares, strict=True)):
    for field in dataclasses.fields(Batch):
      np.testing.assert_array_equal(woven(share, field.name), getattr(one[20 + step], field.name))


@pytest.mark.parametrize("options", [dict(threads=0), dict(threads=5, prefetch=20), dict(threads=1, prefetch=1)])
def test_order_does_not_depend_on_threads(options):
  expected = numbers(take(numbered(100).batches("train", global_batch=4), 60))
  assert numbers(take(numbered(100, **options).batches("train", global_batch=4), 60)) == expected


@pytest.fixture
def parsed_flags():
  """Grain's workers read absl flags."""
  before = flags.FLAGS.is_parsed()
  flags.FLAGS.mark_as_parsed()
  yield
  if not before:
    flags.FLAGS.unparse_flags()


def test_workers_say_what_they_need(monkeypatch):
  monkeypatch.setattr(flags.FlagValues, "is_parsed", lambda self: False)
  with pytest.raises(ConfigError, match=r"data.workers needs parsed absl flags"):
    numbered(9, workers=1).batches("train", global_batch=1)


def test_order_does_not_depend_on_worker_processes(parsed_flags):
  options = DataConfig(source="task", sequence_length=0, task=tasks.TaskConfig(length=5))
  here = take(pipeline.build(options).batches("train", global_batch=4, start_step=2), 9)
  there = pipeline.build(dataclasses.replace(options, workers=2)).batches("train", global_batch=4, start_step=2)
  try:
    for expected in here:
      batch = next(there)
      for field in dataclasses.fields(Batch):
        np.testing.assert_array_equal(getattr(batch, field.name), getattr(expected, field.name))
  finally:
    there.close()


KILLED = """
import itertools, os, signal
from absl import app
from thinking_lm.data import pipeline
def main(argv):
  data = pipeline.build(pipeline.DataConfig(source="task", workers=1))
  batches = data.batches("train", global_batch=2)
  for batch in itertools.islice(batches, 2):
    print(batch.ids_B.tolist(), flush=True)
  os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
  app.run(main)
"""


def test_workers_end_when_the_program_is_killed(tmp_path):
  """The output ends when nobody holds it open any more: neither the program nor its worker."""
  script = tmp_path / "killed.py"
  script.write_text(KILLED)
  environment = os.environ | dict(PYTHONPATH=str(pathlib.Path(__file__).resolve().parents[2]))
  done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=60)
  assert (done.returncode, done.stdout) == (-signal.SIGKILL, "[0, 1]\n[2, 3]\n"), done.stderr


def test_seeds_and_splits_have_their_own_orders():
  def order(data, split="train"):
    return tuple(numbers(take(data.batches(split, global_batch=10), 3)))

  first = numbered(30)
  both = dataclasses.replace(first, splits=dict(train=Numbered(30), validation=Numbered(30)))
  orders = [order(first), order(numbered(30, seed=1)), order(both, "validation")]
  assert len(set(orders)) == 3
  assert order(numbered(30)) == orders[0]


def test_shuffle_leaves_no_neighbours():
  order = np.array(numbers(take(numbered(5000).batches("train", global_batch=100), 50)))
  assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
  assert np.mean(np.abs(np.diff(order)) < 50) < 0.04  # 0.02 by chance
  assert abs(np.corrcoef(order, np.arange(5000))[0, 1]) < 0.05


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize(("limit", "count"), [(None, 10), (5, 5), (4, 4), (100, 10)])
def test_evaluation_is_one_ordered_padded_pass(hosts, limit, count):
  shares = [
    list(numbered(10).evaluation_batches("train", batch_size=4, limit=limit, share=range(host, 4, hosts)))
    for host in range(hosts)
  ]
  assert len({len(share) for share in shares}) == 1
  batches = [Batch(**{f.name: woven(share, f.name) for f in dataclasses.fields(Batch)})
             for share in zip(*shares, strict=True)]  # fmt: skip
  weights = joined(batches, "weights_BT")[:, 0]
  assert weights.tolist() == [1.0] * count + [0.0] * (-count % 4)
  assert numbers(batches)[:count] == list(range(count))
  assert joined(batches, "segments_BT")[:, 0].tolist() == weights.tolist()
  assert joined(batches, "ids_B").tolist() == list(range(len(weights)))


def test_too_few_rows_and_unknown_splits():
  with pytest.raises(DataError, match="train has 3 rows of 1 tokens, fewer than a batch of 4"):
    numbered(3).batches("train", global_batch=4)
  with pytest.raises(ConfigError, match="unknown split 'dev'; known: train"):
    numbered(9).rows("dev")


@pytest.mark.parametrize("bad", [-1, 257])
@pytest.mark.parametrize("column", [0, 1])
def test_ids_outside_the_vocabulary_are_refused_on_the_host(bad, column):
  class Bad(Numbered):
    def read(self, index):
      row = super().read(index)
      row[column][0] = bad if index == 2 else index
      return row

  batches = data_of(Bad(4), 1).evaluation_batches("train", batch_size=4)
  with pytest.raises(DataError, match=f"example 2: token ids reach from .*{bad}.* the vocabulary has 257"):
    next(batches)


def test_task_rows():
  task = tasks.TaskConfig(length=6, eval_length=9, eval_examples=3)
  options = DataConfig(source="task", sequence_length=0, task=task)
  data = pipeline.build(options)
  assert data.sequence_length == 9
  assert [data.rows(split) for split in sources.SPLITS] == [2**20, 3, 3]
  (batch,) = data.evaluation_batches("test", batch_size=4)
  for row, example in enumerate(data.examples("test", 9)):
    np.testing.assert_array_equal(batch.tokens_BT[row], example.tokens)
    np.testing.assert_array_equal(batch.targets_BT[row], example.targets)
  assert batch.weights_BT.sum(1).tolist() == [9.0, 9.0, 9.0, 0.0]
  train = next(data.batches("train", global_batch=2))
  assert train.weights_BT.sum(1).tolist() == [6.0, 6.0]
  with pytest.raises(DataError, match=r"takes up to 9 tokens, more than data.sequence_length=8; raise it, or 0"):
    pipeline.build(dataclasses.replace(options, sequence_length=8))
  with pytest.raises(ConfigError, match=r"examples are for data.source=task, not default"):
    numbered(3).examples("train", 1)


def test_digest_changes_with_what_changes_the_rows_only(tmp_path):
  (tmp_path / "a").write_bytes(b"one text " * 30)
  (tmp_path / "same").write_bytes(b"one text " * 30)
  (tmp_path / "other").write_bytes(b"one text." * 30)
  base = DataConfig(source="text", input=f"{tmp_path}/a", sequence_length=8)

  def digest(**changes):
    return pipeline.build(dataclasses.replace(base, **changes)).digest

  same = [dict(), dict(input=f"{tmp_path}/same"), dict(threads=0, workers=3, prefetch=9), dict(memory_limit_mb=7),
          dict(task=tasks.TaskConfig(length=3))]  # fmt: skip
  different = [dict(input=f"{tmp_path}/other"), dict(sequence_length=9), dict(seed=1), dict(test_fraction=0.1),
               dict(validation_input=f"{tmp_path}/same"), dict(division="tail"), dict(align=4)]  # fmt: skip
  assert {digest(**changes) for changes in same} == {digest()}
  assert len({digest(**changes) for changes in [{}, *different]}) == 1 + len(different)


def test_the_default_corpus_builds():
  data = pipeline.build(DataConfig())
  assert data.task is None and data.vocabulary.size == 257 and len(data.digest) == 64
  batch = next(data.batches("train", global_batch=2))
  assert batch.tokens_BT.shape == (2, 256)
  text = b"".join(data.tokenizer.decode(batch.tokens_BT[0]) for batch in data.evaluation_batches("test", batch_size=1))
  topics = [d for d in sources.embedded_documents() if sources.embedded_split(d.name) == "test"]
  assert text.startswith(topics[0].data[:1000])


def test_a_sketch_reads_nothing_and_a_declared_vocabulary_is_held_to():
  options = pipeline.DataConfig(source="arrayrecord", input="nowhere", tokenizer="sentencepiece:no", vocabulary_size=99)
  made = pipeline.sketch(options)
  assert made.vocabulary.size == len(made.vocabulary.bytes_V) == 99 and made.sequence_length == 256
  assert pipeline.sketch(pipeline.DataConfig()).vocabulary.size == pipeline.build(pipeline.DataConfig()).vocabulary.size
  with pytest.raises(ConfigError, match="vocabulary_size is 99, but tokenizer 'bytes' has"):
    pipeline.build(pipeline.DataConfig(vocabulary_size=99))
  assert pipeline.DataConfig(source="task", vocabulary_size=3).faults()
