"""Tokenises a corpus once into ArrayRecord shards with a manifest, for `data.source=arrayrecord`.

    python -m thinking_lm.prepare --input='corpus/*.jsonl' --format=jsonl --output=prepared --tokenizer=bytes
    python -m thinking_lm.train --config=... --config.data.source=arrayrecord --config.data.input=prepared

A run that was stopped goes on when the same command is given again: finished shards stay after their sha256, and the
content of the documents they were made from, have been compared; an unfinished or damaged one is written again. An
output made from another input, or by another tokenizer, is refused. Input and output may be local or `gs://` paths.
"""

import contextlib
import dataclasses
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator

import tqdm
from absl import flags
from array_record.python import array_record_module
from etils import epath

from thinking_lm import errors
from thinking_lm.data import prepared, sources, tokenizer
from thinking_lm.errors import ConfigError, DataError, UsageError, WorkdirError

INPUT = flags.DEFINE_string("input", None, "Files to read: one or more globs, separated by commas.")
OUTPUT = flags.DEFINE_string("output", None, "Directory to write; made if it is missing.")
TOKENIZER = flags.DEFINE_string("tokenizer", "bytes", "bytes, tokenizers:PATH or sentencepiece:PATH.")
FORMAT = flags.DEFINE_enum("format", "text", sorted(sources.DOCUMENTS), "text: a document a file; jsonl: one a line.")
FIELD = flags.DEFINE_string("field", "text", "jsonl: the field that holds the text.")
ON_BAD_UTF8 = flags.DEFINE_enum("on_bad_utf8", "error", sources.POLICIES, "Bytes that are not UTF-8: stop, or U+FFFD.")
ON_EMPTY = flags.DEFINE_enum("on_empty", "error", sources.EMPTY_POLICIES, "Empty documents: stop, or skip.")
SHARD_TOKENS = flags.DEFINE_integer("shard_tokens", 2**26, "A shard ends with the document that reaches this.", 1)

SECONDS_BETWEEN_LINES = 10.0


@dataclasses.dataclass(frozen=True)
class Job:
  """What is prepared, and how; two jobs with equal `record`s make the same bytes.

  files: of the input, sorted. name, encoder: the tokenizer by name and itself.
  """

  files: list[epath.Path]
  format: str
  policy: sources.Policy
  name: str
  encoder: tokenizer.Tokenizer
  shard_tokens: int
  record_tokens: int = prepared.RECORD_TOKENS

  def record(self) -> dict:
    """The job as JSON values, for the manifest."""
    return dict(
      files=[[str(path), path.stat().length] for path in self.files],
      format=self.format,
      policy=dataclasses.asdict(self.policy),
      tokenizer_digest=self.encoder.digest,
      shard_tokens=self.shard_tokens,
      record_tokens=self.record_tokens,
    )

  def manifest(self) -> prepared.Manifest:
    """The manifest of an output without any shard."""
    vocabulary = self.encoder.vocabulary
    return prepared.Manifest(
      format=prepared.FORMAT,
      complete=False,
      job=self.record(),
      tokenizer=self.name,
      tokenizer_digest=self.encoder.digest,
      vocabulary_size=vocabulary.size,
      dtype=sources.token_dtype(vocabulary.document).name,
      record_tokens=self.record_tokens,
      counts={},
      shards=(),
    )


class Progress:
  """A bar on a terminal, else a line every few seconds: bytes of text done, shards, tokens per second.

  The total is that of the input files, so that JSONL, where the text is a part of the file, ends before 100 %.
  """

  def __init__(self, total_bytes: int):
    self._total, self._done, self._tokens = total_bytes, 0, 0
    self._start = self._printed = time.monotonic()
    self._bar = None
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(total=total_bytes, unit="B", unit_scale=True, desc="prepare", file=sys.stderr)

  def add(self, size: int, tokens: int, shards: int) -> None:
    """Counts one document."""
    self._done, self._tokens = self._done + size, self._tokens + tokens
    if self._bar is not None:
      self._bar.update(size)
      self._bar.set_postfix(shards=shards, tokens=self._tokens, refresh=False)
    elif time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
      self._printed = time.monotonic()
      rate = self._tokens / (self._printed - self._start)
      share = min(self._done / max(self._total, 1), 1.0)
      print(f"prepare: {share:.0%} of {self._total} bytes, {shards} shards, {rate:.3g} tokens/s", flush=True)

  def close(self) -> None:
    """Leaves the bar as it is and gives the line back."""
    if self._bar is not None:
      self._bar.close()


def prepare(job: Job, output: str) -> prepared.Manifest:
  """Writes what is missing of a prepared directory and returns its manifest.

  Raises:
    ConfigError: the directory holds the output of another job. DataError: the input is unusable, or is not what the
      finished shards were made from. WorkdirError: the directory cannot be written.
  """
  directory = epath.Path(output)
  try:
    directory.mkdir(parents=True, exist_ok=True)
    manifest = _sound(directory, _manifest(job, directory))
    if manifest.complete:
      return manifest
    return _write(job, directory, manifest)
  except ImportError as error:
    raise ConfigError(f"{output} needs a package for this kind of path: {error}") from error
  except OSError as error:
    raise WorkdirError(f"{output} cannot be written: {error}") from error


def _manifest(job: Job, directory: epath.Path) -> prepared.Manifest:
  """The manifest to go on from; compares what is there with the job."""
  found, fresh = prepared.read_manifest(directory), job.manifest()
  if found is None:
    there = directory.iterdir() if directory.exists() else ()  # in an object store, mkdir makes nothing
    strange = sorted(path.name for path in there if not path.name.startswith("shard-"))
    strange = [name for name in strange if name != f"{prepared.MANIFEST}.partial"]
    if strange:
      raise ConfigError(f"{directory} is not empty ({strange[0]}) and no output of prepare; choose another --output")
    prepared.write_manifest(directory, fresh)
    return fresh
  for key, value in fresh.job.items():
    if found.job.get(key) != value:
      raise ConfigError(
        f"{directory} was made by another job: {key} was {_short(found.job.get(key))}, now {_short(value)}; "
        "give the old options, or another --output"
      )
  return found


def _sound(directory: epath.Path, manifest: prepared.Manifest) -> prepared.Manifest:
  """The manifest up to its first damaged shard; that shard and those after it are written again."""
  for number, shard in enumerate(manifest.shards):
    try:
      prepared.check_shard(directory, number, shard, content=True)
    except DataError as error:
      print(f"prepare: writing again from shard {number} on: {error}", flush=True)
      return dataclasses.replace(manifest, complete=False, shards=manifest.shards[:number])
  return manifest


def _short(value) -> str:
  text = str(value)
  return text if len(text) <= 80 else f"{text[:77]}..."


def _write(job: Job, directory: epath.Path, manifest: prepared.Manifest) -> prepared.Manifest:
  """Goes through all documents: compares those of finished shards, tokenises the others."""
  counts: dict[str, int] = {}
  documents = sources.DOCUMENTS[job.format](job.files, job.policy, counts)
  with contextlib.closing(Progress(sum(path.stat().length for path in job.files))) as progress:
    for number, shard in enumerate(manifest.shards):
      _compare(directory, number, shard, documents, progress)
    if manifest.shards:
      print(f"prepare: {len(manifest.shards)} finished shards kept", flush=True)
    while (shard := _write_shard(job, directory, len(manifest.shards), documents, progress)) is not None:
      manifest = dataclasses.replace(manifest, shards=(*manifest.shards, shard))
      prepared.write_manifest(directory, manifest)
  if not manifest.shards:
    raise DataError(f"no documents are left of {len(job.files)} files; {counts.get('empty_skipped', 0)} were empty")
  manifest = dataclasses.replace(manifest, complete=True, counts=counts)
  prepared.write_manifest(directory, manifest)
  return manifest


def _compare(directory, number: int, shard: prepared.Shard, documents: Iterator[sources.Document], progress) -> None:
  """Takes the documents of a finished shard from the input and compares their content with its index."""
  for _, digest in prepared.read_index(directory, number, shard):
    document = next(documents, None)
    if document is None or sources.content_digest(document.data) != digest:
      name = "the end of the input" if document is None else document.name
      raise DataError(
        f"{name} is not what {prepared.shard_path(directory, number)} was made from; restore the input, "
        "or choose another --output"
      )
    progress.add(len(document.data), 0, number)


def _write_shard(job: Job, directory, number: int, documents: Iterator[sources.Document], progress):
  """Writes the next shard; None if no document is left. Its files appear under their names only when complete."""
  path = prepared.shard_path(directory, number)
  remote = sources.is_remote(path)
  scratch = pathlib.Path(tempfile.mkdtemp(prefix="thinking_lm-prepare-")) if remote else pathlib.Path(directory)
  partial = scratch / f"{path.name}.partial"
  try:
    index, size, records = _fill(job, partial, number, documents, progress)
    if not index:
      return None
    size_on_disk, sha256 = prepared.file_digest(epath.Path(partial))
    content = prepared.index_bytes(index)
    if remote:
      epath.Path(partial).copy(path, overwrite=True)
    else:
      with open(partial, "rb") as file:
        os.fsync(file.fileno())
      os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)
    if remote:
      scratch.rmdir()
  prepared.write_whole(prepared.index_path(directory, number), content)
  tokens = sum(length for length, _ in index)
  index_sha256 = prepared.sha256_of(content)
  return prepared.Shard(records, len(index), tokens, size, size_on_disk, sha256, len(content), index_sha256)


def _fill(job: Job, partial: pathlib.Path, number: int, documents: Iterator[sources.Document], progress):
  """Writes documents to one ArrayRecord file; gives its index (length, digest), bytes of text and records."""
  dtype = sources.token_dtype(job.encoder.vocabulary.document).newbyteorder("<")
  index, size, tokens, records = [], 0, 0, 0
  try:
    writer = array_record_module.ArrayRecordWriter(os.fspath(partial), "group_size:1")
    while tokens < job.shard_tokens and (document := next(documents, None)) is not None:
      ids = sources.encode(document, job.encoder).astype(dtype)
      for start in range(0, len(ids), job.record_tokens):
        writer.write(ids[start : start + job.record_tokens].tobytes())
        records += 1
      index.append((len(ids), sources.content_digest(document.data)))
      size, tokens = size + len(document.data), tokens + len(ids)
      progress.add(len(document.data), len(ids), number)
    writer.close()
  except RuntimeError as error:
    raise WorkdirError(f"{partial} cannot be written: {error}") from error
  return index, size, records


def main(argv) -> None:
  """Runs the command."""
  del argv
  for flag in (INPUT, OUTPUT):
    if not flag.value:
      raise UsageError(f"--{flag.name} is missing; see --help")
  start = time.monotonic()
  files = sources.paths(INPUT.value, "--input")
  policy = sources.Policy(FIELD.value, ON_BAD_UTF8.value, ON_EMPTY.value)
  encoder = tokenizer.from_name(TOKENIZER.value)
  job = Job(files, FORMAT.value, policy, TOKENIZER.value, encoder, SHARD_TOKENS.value)
  manifest = prepare(job, OUTPUT.value)
  documents = sum(shard.documents for shard in manifest.shards)
  tokens = sum(shard.tokens for shard in manifest.shards)
  notes = "".join(f", {name} {count}" for name, count in sorted(manifest.counts.items()))
  print(
    f"prepare: {OUTPUT.value} is complete: {len(manifest.shards)} shards, {documents} documents, {tokens} tokens{notes}"
    f" ({time.monotonic() - start:.1f} s)"
  )


if __name__ == "__main__":
  errors.run(main)
