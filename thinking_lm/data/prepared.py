"""Prepared corpora: a directory of tokens in ArrayRecord shards with a manifest, as `thinking_lm.prepare` writes it.

    manifest.json            what it was made from, the tokenizer, and of every finished file its size and sha256
    shard-00000.arrayrecord  records of at most `record_tokens` ids of one document (little-endian, `dtype`)
    shard-00000.index.npy    uint64 [documents, 2]: length in tokens and content digest of each document

With the lengths in the index, any token of any document is found without a scan. ArrayRecord opens damaged files
without complaint (a truncated or missing one seems to have no records), so sizes and counts are compared with the
manifest when a corpus is opened. A shard below `gs://` is copied once into ~/.cache/thinking_lm, since ArrayRecord
reads local files only.
"""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import tempfile
from collections.abc import Sequence

import numpy as np
from array_record.python import array_record_module
from etils import epath

from thinking_lm.data import sources
from thinking_lm.data.tokenizer import Tokenizer
from thinking_lm.errors import ConfigError, DataError

FORMAT = 1
MANIFEST = "manifest.json"
RECORD_TOKENS = 4096
DTYPES = ("uint8", "uint16", "int32")
READ_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
BLOCK = 2**20


@dataclasses.dataclass(frozen=True)
class Shard:
  """A finished shard: its counts, and size and sha256 of its two files. `bytes` are those of the documents' text."""

  records: int
  documents: int
  tokens: int
  bytes: int
  size: int
  sha256: str
  index_size: int
  index_sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a prepared directory holds.

  complete: every document of the input is in. job: what it was made from and how, for comparison on a restart.
  tokenizer, tokenizer_digest, vocabulary_size: of the ids. counts: what was replaced or skipped.
  """

  format: int
  complete: bool
  job: dict
  tokenizer: str
  tokenizer_digest: str
  vocabulary_size: int
  dtype: str
  record_tokens: int
  counts: dict
  shards: tuple[Shard, ...]

  def digest(self) -> str:
    """sha256 of the shards' digests: of the whole content."""
    return hashlib.sha256("".join(shard.sha256 + shard.index_sha256 for shard in self.shards).encode()).hexdigest()


def shard_path(directory: epath.Path, number: int) -> epath.Path:
  """The ArrayRecord file of a shard."""
  return directory / f"shard-{number:05d}.arrayrecord"


def index_path(directory: epath.Path, number: int) -> epath.Path:
  """The index file of a shard."""
  return directory / f"shard-{number:05d}.index.npy"


def read_manifest(directory: epath.Path) -> Manifest | None:
  """The manifest, or None where there is none. Raises DataError for one that does not read."""
  path = directory / MANIFEST
  try:
    if not path.exists():
      return None
    values = json.loads(path.read_text())
    shards = tuple(Shard(**shard) for shard in values.pop("shards"))
    manifest = Manifest(**values, shards=shards)
  except ImportError as error:
    raise ConfigError(f"{directory} needs a package for this kind of path: {error}") from error
  except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
    raise DataError(f"{path} is damaged ({error}); restore it, or delete the directory and prepare again") from error
  if manifest.format != FORMAT or manifest.dtype not in DTYPES:
    raise DataError(f"{path} has format {manifest.format!r} and dtype {manifest.dtype!r}; this version reads {FORMAT}")
  return manifest


def write_manifest(directory: epath.Path, manifest: Manifest) -> None:
  """Replaces the manifest in one step."""
  write_whole(directory / MANIFEST, (json.dumps(dataclasses.asdict(manifest), indent=1) + "\n").encode())


def write_whole(path: epath.Path, content: bytes) -> None:
  """Writes a file so that it is either there with all its content or not there."""
  if sources.is_remote(path):
    path.write_bytes(content)  # object stores show an object only when it is complete
    return
  partial = f"{path}.partial"
  with open(partial, "wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


def file_digest(path: epath.Path) -> tuple[int, str]:
  """Size and hexadecimal sha256 of a file."""
  digest, size = hashlib.sha256(), 0
  with path.open("rb") as file:
    while block := file.read(BLOCK):
      digest.update(block)
      size += len(block)
  return size, digest.hexdigest()


def check_shard(directory: epath.Path, number: int, shard: Shard, content: bool) -> None:
  """Compares the two files of a shard with the manifest: sizes, and sha256 if `content`. DataError names the file."""
  files = (
    (shard_path(directory, number), shard.size, shard.sha256),
    (index_path(directory, number), shard.index_size, shard.index_sha256),
  )
  for path, size, sha256 in files:
    try:
      found = path.stat().length
      if found == size and content:
        found, actual = file_digest(path)
        if actual != sha256:
          raise DataError(f"{path} is damaged: sha256 {actual[:12]}, the manifest says {sha256[:12]}; prepare again")
    except OSError as error:
      raise DataError(f"{path} cannot be read: {error}; restore it, or prepare again") from error
    if found != size:
      raise DataError(f"{path} has {found} bytes, the manifest says {size}; restore it, or prepare again")


def sha256_of(content: bytes) -> str:
  """Hexadecimal sha256."""
  return hashlib.sha256(content).hexdigest()


def index_bytes(index: Sequence[tuple[int, int]]) -> bytes:
  """The index file of (length in tokens, content digest) pairs."""
  buffer = io.BytesIO()
  # npy of plain numbers; `np.load` refuses a file that holds objects, for reading one could run code.
  np.save(buffer, np.array(index, np.uint64).reshape(-1, 2))
  return buffer.getvalue()


def read_index(directory: epath.Path, number: int, shard: Shard) -> np.ndarray:
  """uint64 [documents, 2] of a shard, checked against its digest and counts."""
  path = index_path(directory, number)
  content = path.read_bytes()
  if sha256_of(content) != shard.index_sha256:
    raise DataError(f"{path} is damaged: its sha256 is not the manifest's; restore it, or prepare again")
  index = np.load(io.BytesIO(content))  # see index_bytes
  if index.shape != (shard.documents, 2) or int(index[:, 0].sum()) != shard.tokens:
    raise DataError(f"{path} does not have the {shard.documents} documents of the manifest; prepare again")
  return index


def records_of(length_N: np.ndarray, record_tokens: int) -> np.ndarray:
  """How many records documents of these lengths take."""
  return -(-length_N // record_tokens)


class PreparedCorpus:
  """A prepared directory as a corpus (`sources.Corpus`). Opening compares sizes and counts, and sha256 if `verify`.

  Raises:
    ConfigError: the directory was made with another tokenizer, or is none.
    DataError: it is unfinished or damaged.
  """

  def __init__(self, directory: str, tokenizer: Tokenizer, verify: bool = False):
    self._directory = epath.Path(directory)
    manifest = read_manifest(self._directory)
    if manifest is None:
      raise ConfigError(f"{directory} has no {MANIFEST}; make one: python -m thinking_lm.prepare --output={directory}")
    if not manifest.complete:
      raise DataError(f"{directory} is unfinished; run the same python -m thinking_lm.prepare command again")
    if manifest.tokenizer_digest != tokenizer.digest:
      raise ConfigError(
        f"{directory} was made with another tokenizer, {manifest.tokenizer!r} (digest "
        f"{manifest.tokenizer_digest[:12]}, yours {tokenizer.digest[:12]}); set data.tokenizer to that one"
      )
    self._manifest = manifest
    indices = []
    for number, shard in enumerate(manifest.shards):
      check_shard(self._directory, number, shard, content=verify)
      indices.append(read_index(self._directory, number, shard))
    index = np.concatenate(indices) if indices else np.zeros((0, 2), np.uint64)
    self.lengths_N, self.digests_N = index[:, 0].astype(np.int64), np.ascontiguousarray(index[:, 1])
    self.digest = manifest.digest()
    self._first_N = np.cumsum([0] + [shard.documents for shard in manifest.shards])
    records_N = records_of(self.lengths_N, manifest.record_tokens)
    self._record_N = np.cumsum(records_N) - records_N
    self._readers: dict[int, array_record_module.ArrayRecordReader] = {}

  def __getstate__(self):
    return self.__dict__ | dict(_readers={})

  def name(self, document: int) -> str:
    number = self._shard_of(document)
    return f"{shard_path(self._directory, number)} document {document - self._first_N[number]}"

  def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
    number, size = self._shard_of(document), self._manifest.record_tokens
    base = int(self._record_N[document] - self._record_N[self._first_N[number]])
    first, last = start // size, (stop - 1) // size
    wanted = range(base + first, base + last + 1)
    length = int(self.lengths_N[document])
    dtype = np.dtype(self._manifest.dtype).newbyteorder("<")
    pieces = []
    for record, content in zip(wanted, self._read(number, wanted), strict=True):
      expected = min(size, length - (record - base) * size)
      if len(content) != expected * dtype.itemsize:
        raise DataError(
          f"{shard_path(self._directory, number)} record {record} has {len(content)} bytes, not "
          f"{expected * dtype.itemsize}; restore it, or prepare again"
        )
      pieces.append(np.frombuffer(content, dtype))
    return np.concatenate(pieces)[start - first * size : stop - first * size]

  def _shard_of(self, document: int) -> int:
    return int(np.searchsorted(self._first_N, document, side="right")) - 1

  def _read(self, number: int, records: Sequence[int]) -> list[bytes]:
    reader = self._readers.get(number)
    try:
      if reader is None:
        reader = self._open(number)
        self._readers[number] = reader
      return reader.read(list(records))
    except (RuntimeError, OSError) as error:
      raise DataError(
        f"{shard_path(self._directory, number)} is damaged at record {records[0]} ({error}); "
        "restore it, or prepare again"
      ) from error

  def _open(self, number: int):
    shard = self._manifest.shards[number]
    path = _local(shard_path(self._directory, number), shard)
    reader = array_record_module.ArrayRecordReader(path, READ_OPTIONS)
    if reader.num_records() != shard.records:
      raise DataError(
        f"{path} has {reader.num_records()} records, the manifest says {shard.records}; restore it, or prepare again"
      )
    return reader


def _local(path: epath.Path, shard: Shard) -> str:
  """A local file with the shard's content: itself, or the cached copy of a remote one, made if it is missing."""
  if not sources.is_remote(path):
    return os.fspath(path)
  cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "thinking_lm" / "shards"
  cache.mkdir(parents=True, exist_ok=True, mode=0o700)
  copy = cache / shard.sha256
  if not copy.exists() or copy.stat().st_size != shard.size:
    with path.open("rb") as remote, tempfile.NamedTemporaryFile(dir=cache, suffix=".partial", delete=False) as file:
      while block := remote.read(BLOCK):
        file.write(block)
    size, sha256 = file_digest(epath.Path(file.name))
    if sha256 != shard.sha256:
      os.unlink(file.name)
      raise DataError(f"{path} is damaged: {size} bytes of another sha256 than the manifest's; prepare again")
    os.replace(file.name, copy)
  return os.fspath(copy)
