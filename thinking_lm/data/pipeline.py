"""From a DataConfig to batches: rows with random access, shuffled, sharded by host, prefetched.

The position in the data is one integer, the step. Example g = step * global_batch + row of the endless shuffled stream
is row shuffle(g) of the split, whatever the number of hosts, workers or threads, so that any step can be replayed and
a run may go on with other hosts. Epoch e is example rows * e to rows * (e + 1) - 1: each row once.
"""

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np
from absl import flags

from thinking_lm import config, types
from thinking_lm.data import prepared, sources, tasks, tokenizer, verdicts
from thinking_lm.data.rows import DocumentRows, FirstRows, PackedRows, Rows, TaskRows, assemble
from thinking_lm.data.verdicts import VerdictConfig
from thinking_lm.errors import ConfigError, DataError

SOURCES = ("default", "task", "arrayrecord", "verdicts", *sources.DOCUMENTS)
TASKS = ("task", "verdicts")
"""Sources of one example a row, with a prompt and an answer, or labels."""
ENDLESS = 2**62
ROWS_VERSION = 1
"""Part of the digest; raised whenever the same options and content would give other rows or another order."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where the data comes from and how it becomes rows."""

  source: str = config.option(
    "default", "default: the embedded corpus; task: a synthetic task; verdicts: see data/verdicts.py", choices=SOURCES
  )
  input: str = config.option(
    "", "text, jsonl, verdicts: globs separated by commas; arrayrecord: the directory that prepare made"
  )
  validation_input: str = config.option("", "the same for validation, instead of a share of `input`")
  test_input: str = config.option("", "the same for test, instead of a share of `input`")
  field: str = config.option("text", "jsonl: the field that holds the text")
  tokenizer: str = config.option("bytes", "bytes, tokenizers:PATH or sentencepiece:PATH; a task brings its own")
  vocabulary_size: int = config.option(
    0, "ids that the tokenizer must have, so that a plan needs no tokenizer; 0: as many as it has", low=0
  )
  sequence_length: int = config.option(256, "tokens of a row; 0: as long as the task's longest example", low=0)
  packing: bool = config.option(True, "rows cut from one stream of all documents; otherwise one document a row")
  align: int = config.option(
    1, "packing: documents start at multiples of this; with a thought.stride that divides it, blocks are full", low=1
  )
  division: str = config.option(
    "auto",
    "how validation and test get their share: whole documents by hash, the tail of each document, or auto (tail for "
    "fewer than 50 packed documents, else hash)",
    choices=sources.DIVISIONS,
  )
  validation_fraction: float = config.option(0.05, "share of `input` for validation", low=0.0, high=0.9)
  test_fraction: float = config.option(0.05, "share of `input` for test", low=0.0, high=0.9)
  on_bad_utf8: str = config.option("error", "bytes that are not UTF-8: stop, or put U+FFFD", choices=sources.POLICIES)
  on_empty: str = config.option("error", "empty documents: stop, or skip", choices=sources.EMPTY_POLICIES)
  memory_limit_mb: int = config.option(4096, "most memory for a corpus that was not prepared", low=1)
  verify: bool = config.option(False, "arrayrecord: read everything and compare sha256 before the start")
  task: tasks.TaskConfig = config.option(tasks.TaskConfig(), "the synthetic task")  # noqa: RUF009 (frozen)
  verdicts: VerdictConfig = config.option(VerdictConfig(), "candidates to verify")  # noqa: RUF009
  seed: int = config.option(0, "seed of the order and of the task's examples", low=0, high=2**32 - 1)
  threads: int = config.option(2, "threads that make batches ahead (in each worker); 0: none", low=0, high=256)
  prefetch: int = config.option(4, "batches made ahead", low=1, high=10000)
  workers: int = config.option(0, "processes that make batches; 0: this one", low=0, high=256)

  def faults(self) -> list[str]:
    """Rules across fields."""
    faults = []
    if self.vocabulary_size and self.source == "task":
      faults.append("vocabulary_size is for source=text, jsonl, arrayrecord: a task brings its own tokenizer")
    if self.sequence_length == 0 and self.source not in TASKS:
      faults.append(
        f"sequence_length=0 is for source={' or '.join(TASKS)}; give the tokens of a row for source={self.source}"
      )
    if self.source in ("default", "task") and (self.input or self.validation_input or self.test_input):
      faults.append(f"input is not read with source={self.source}; see source=text, jsonl or arrayrecord")
    if self.source not in ("default", "task") and not self.input:
      faults.append(f"source={self.source} needs input")
    if self.validation_fraction + self.test_fraction > 0.95:
      faults.append("validation_fraction + test_fraction must be at most 0.95")
    if self.aligned and self.sequence_length % self.aligned:
      faults.append(
        f"sequence_length={self.sequence_length} is not a multiple of align={self.align}: a row could start within "
        f"padding; the next is {-(-self.sequence_length // self.align) * self.align}, and align=1 allows any"
      )
    return faults

  @property
  def aligned(self) -> int:
    """Documents start at multiples of so many tokens of a row; 0: each has a row of its own, and starts at 0."""
    return self.align if self.packing and self.source not in TASKS else 0


@dataclasses.dataclass(frozen=True)
class BatchMaker:
  """step -> the rows `share` of its batch; what Grain's threads and workers run."""

  rows: Rows
  order: grain.MapDataset | None
  length: int
  global_batch: int
  share: Sequence[int]
  vocabulary: types.Vocabulary

  def __call__(self, step: int) -> types.Batch:
    first = step * self.global_batch
    examples = [first + row for row in self.share]
    ids_B = np.array([example % 2**32 for example in examples], np.uint32)
    return assemble([self._row(example) for example in examples], self.length, ids_B, self.vocabulary)

  def _row(self, example: int):
    if self.order is not None:
      return self.rows.read(int(self.order[example]))
    return self.rows.read(example) if example < len(self.rows) else None


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
  """What `build` gives.

  vocabulary, tokenizer: of the tokens (of a sketch, a stand-in).
  digest: hexadecimal sha256 of everything that decides which example has which
  number: source content, tokenizer, and the options that change rows or order. sequence_length: T. task: the synthetic
  task, or None. counts: how often something was mended or skipped because the config asked for it, and how many
  documents of a `validation_input` or `test_input` also stand in `input`.
  """

  options: DataConfig
  vocabulary: types.Vocabulary
  tokenizer: tokenizer.Tokenizer
  digest: str
  sequence_length: int
  task: tasks.Task | None
  counts: Mapping[str, int]
  splits: Mapping[str, Rows]

  @property
  def aligned(self) -> int:
    """See `DataConfig.aligned`."""
    return self.options.aligned

  def rows(self, split: str) -> int:
    """Rows of a split (0 where the config gives it no data)."""
    return len(config.pick(self.splits, split, "split"))

  def batches(
    self, split: str, *, global_batch: int, start_step: int = 0, share: Sequence[int] | None = None
  ) -> Iterator[types.Batch]:
    """Endless batches from `start_step` on, shuffled anew every epoch; of each the rows `share` (None: all).

    Leaves are numpy arrays. `ids_B` is step * global_batch + row, modulo 2**32. Raises DataError if the split has fewer
    rows than a batch.
    """
    rows = self.rows(split)
    if rows < global_batch:
      raise DataError(
        f"{split} has {rows} rows of {self.sequence_length} tokens, fewer than a batch of {global_batch}; "
        "give more data, a smaller batch or a shorter data.sequence_length"
      )
    seed = hashlib.sha256(f"{self.options.seed}/{split}".encode()).digest()[:4]
    order = grain.MapDataset.range(rows).shuffle(seed=int.from_bytes(seed, "big")).repeat()
    maker = self._maker(self.splits[split], order, global_batch, share)
    return self._iterate(maker, start_step, ENDLESS)

  def evaluation_batches(
    self, split: str, *, batch_size: int, share: Sequence[int] | None = None, limit: int | None = None
  ) -> Iterator[types.Batch]:
    """One pass in order over the first `limit` rows (default all), in global batches of `batch_size`.

    share: as in `batches`. Rows past the end have weight 0 and segment 0. `ids_B` is the row.
    """
    rows = config.pick(self.splits, split, "split")
    if not len(rows):
      raise DataError(f"{split} has no rows; see data.{split}_input and data.{split}_fraction")
    count = len(rows) if limit is None else min(limit, len(rows))
    maker = self._maker(FirstRows(rows, count), None, batch_size, share)
    return self._iterate(maker, 0, -(-count // batch_size))

  def examples(self, split: str, count: int) -> list[tasks.Example]:
    """The first `count` examples of a task's split, in order (fewer if it has fewer)."""
    if self.task is None:
      raise ConfigError(f"examples are for data.source=task, not {self.options.source}")
    return [self.task.example(self.options.seed, split, index) for index in range(min(count, self.rows(split)))]

  def _maker(self, rows: Rows, order, size: int, share: Sequence[int] | None) -> BatchMaker:
    share = range(size) if share is None else share
    return BatchMaker(rows, order, self.sequence_length, size, share, self.vocabulary)

  def _iterate(self, maker: BatchMaker, start: int, stop: int) -> Iterator[types.Batch]:
    threads, ahead, workers = self.options.threads, self.options.prefetch, self.options.workers
    steps = grain.MapDataset.range(start, stop).map(maker)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads) if threads else 0)
    dataset = steps.to_iter_dataset(options)
    if workers:
      if not flags.FLAGS.is_parsed():
        raise ConfigError("data.workers needs parsed absl flags: start with absl.app.run, or data.workers=0")
      processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
      dataset = dataset.mp_prefetch(processes, worker_init_fn=end_with_parent)
    return iter(dataset)


def end_with_parent(index: int, count: int) -> None:
  """Run in a worker: makes it end when the process that started it does, even by SIGKILL."""
  del index, count
  parent = multiprocessing.parent_process()

  def watch() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


PLACES = ("input", "validation_input", "test_input", "tokenizer")
"""Options that say where the data lies, and nothing about what it says."""


def locate(options: DataConfig) -> DataConfig:
  """The options with absolute paths: the same files from any directory."""
  globs = {name: getattr(options, name).split(",") for name in PLACES[:-1]}
  found = {
    name: ",".join(sources.absolute(part.strip()) for part in parts if part.strip()) for name, parts in globs.items()
  }
  kind, path = tokenizer.split_name(options.tokenizer)
  if path:
    found["tokenizer"] = f"{kind}:{sources.absolute(path)}"
  return dataclasses.replace(options, **found)


def without_rows(options: DataConfig) -> Data:
  """`build` for those who only turn texts into tokens and back: no corpus is read, no split has rows, no digest."""
  if options.source == "task":
    return _build_task(options)
  encoder = _encoder(options)
  return Data(options, encoder.vocabulary, encoder, "", options.sequence_length, None, {}, {})


def sketch(options: DataConfig) -> Data:
  """`without_rows` that needs no tokenizer either where `vocabulary_size` says how many ids it has."""
  size = options.vocabulary_size
  if not size:
    return without_rows(options)
  encoder = tokenizer.StandIn(size)
  return Data(options, encoder.vocabulary, encoder, "", options.sequence_length, None, {}, {})


def build(options: DataConfig) -> Data:
  """Reads, checks and indexes the data.

  Raises:
    ConfigError: a glob without files, an unknown tokenizer or one of another `vocabulary_size`, a prepared directory of
      another tokenizer.
    DataError: unusable content; the message names the file, line or document.
  """
  if options.source in TASKS:
    return _build_task(options)
  return _build_documents(options, _encoder(options))


def _encoder(options: DataConfig) -> tokenizer.Tokenizer:
  encoder = tokenizer.from_name(options.tokenizer)
  size = encoder.vocabulary.size
  if options.vocabulary_size not in (0, size):
    raise ConfigError(
      f"data.vocabulary_size is {options.vocabulary_size}, but tokenizer {options.tokenizer!r} has {size} ids"
    )
  return encoder


def _digest(options: DataConfig, contents: Mapping[str, str], encoder: tokenizer.Tokenizer) -> str:
  """Of contents, tokenizer and options; where the data lies and how fast it is read do not count."""
  ignored = {*PLACES, "memory_limit_mb", "verify"}
  ignored |= {"threads", "prefetch", "workers", "vocabulary_size"} | ({"task", "verdicts"} - {options.source})
  kept = {name: value for name, value in dataclasses.asdict(options).items() if name not in ignored}
  text = json.dumps([ROWS_VERSION, kept, contents, encoder.digest], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _build_task(options: DataConfig) -> Data:
  if options.source == "verdicts":
    task = verdicts.build(options, _encoder(options))
    longest, contents = task.longest(), dict(verdicts=task.digest())
  else:
    task = tasks.build(options.task)
    longest, contents = max(task.longest(task.length(split)) for split in sources.SPLITS), {}
  length = options.sequence_length or longest
  if longest > length:
    raise DataError(
      f"{options.source} {task.options.name}: an example takes up to {longest} tokens, more than data.sequence_length="
      f"{length}; raise it, or 0 for its own"
    )
  splits = {split: TaskRows(task, options.seed, split) for split in sources.SPLITS}
  digest = _digest(options, contents, task.tokenizer)
  return Data(options, task.tokenizer.vocabulary, task.tokenizer, digest, length, task, {}, splits)


def _build_documents(options: DataConfig, encoder: tokenizer.Tokenizer) -> Data:
  counts: dict[str, int] = {}
  parts, contents = _parts(options, encoder, counts)
  make = functools.partial(PackedRows, align=options.align) if options.packing else DocumentRows
  border, length = encoder.vocabulary.document, options.sequence_length
  splits = {split: make(corpus, spans, length, border) for split, (corpus, spans) in parts.items()}
  return Data(options, encoder.vocabulary, encoder, _digest(options, contents, encoder), length, None, counts, splits)


def _parts(options: DataConfig, encoder: tokenizer.Tokenizer, counts: dict[str, int]):
  """The corpus and the spans of each split, and the digests of the corpora read."""
  if options.source == "default":
    corpus = sources.MemoryCorpus(sources.embedded_documents(), encoder, options.memory_limit_mb)
    names = [sources.embedded_split(corpus.name(number)) for number in range(len(corpus.lengths_N))]
    parts = {split: (corpus, sources.whole(corpus, np.array(names) == split)) for split in sources.SPLITS}
    return parts, dict(input=corpus.digest)
  main = _corpus(options, "input", encoder, counts)
  own = {split: name for split in ("validation", "test") if getattr(options, name := f"{split}_input")}
  shares = [0.0 if split in own else getattr(options, f"{split}_fraction") for split in ("validation", "test")]
  division = "hash" if options.division == "auto" and not options.packing else options.division
  spans = sources.DIVISIONS[division](main, *shares)
  parts = {split: (main, spans[split]) for split in sources.SPLITS}
  contents = dict(input=main.digest)
  for split, name in own.items():
    corpus = _corpus(options, name, encoder, counts)
    parts[split] = (corpus, sources.whole(corpus, np.ones(len(corpus.lengths_N), bool)))
    contents[name] = corpus.digest
    if shared := int(np.isin(corpus.digests_N, main.digests_N).sum()):
      counts[f"{split}_documents_in_train"] = shared
  if not len(parts["train"][1].document_N):
    raise DataError(
      f"train has no documents: all {len(main.lengths_N)} of data.input went to validation and test; "
      "give more documents, data.division=tail, or smaller fractions"
    )
  return parts, contents


def _corpus(options: DataConfig, name: str, encoder: tokenizer.Tokenizer, counts: dict[str, int]) -> sources.Corpus:
  """The corpus that one of the `input` options names."""
  where = getattr(options, name)
  if options.source == "arrayrecord":
    corpus = prepared.PreparedCorpus(where, encoder, verify=options.verify)
  else:
    policy = sources.Policy(options.field, options.on_bad_utf8, options.on_empty)
    files = sources.paths(where, f"data.{name}")
    documents = sources.DOCUMENTS[options.source](files, policy, counts)
    corpus = sources.MemoryCorpus(documents, encoder, options.memory_limit_mb)
  if not len(corpus.lengths_N):
    raise DataError(f"data.{name}={where!r} has no documents left; {counts.get('empty_skipped', 0)} were empty")
  if int(corpus.lengths_N.sum()) < 2:
    raise DataError(f"{corpus.name(0)}: the whole of data.{name} is one token; there is nothing to learn from it")
  return corpus
