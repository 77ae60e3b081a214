"""Documents: where text comes from, how it becomes token arrays, and which split each document belongs to.

A corpus is documents of tokens with random access. Text, JSONL and the embedded corpus are read and tokenised into
memory; larger corpora are tokenised once by `thinking_lm.prepare` and read from disk (`data/prepared.py`).
"""

import dataclasses
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np
from etils import epath

from thinking_lm.data.tokenizer import Tokenizer
from thinking_lm.errors import ConfigError, DataError

SPLITS = ("train", "validation", "test")
POLICIES = ("error", "replace")
EMPTY_POLICIES = ("error", "skip")
TAIL_BELOW = 50
"""With fewer documents than this, `split=auto` splits every document by position instead of by document."""


@dataclasses.dataclass(frozen=True)
class Document:
  """name: what messages call it (a path, path:line or topic). data: its bytes."""

  name: str
  data: bytes


@dataclasses.dataclass(frozen=True)
class Policy:
  """What to do with text that is not as it should be.

  field: the JSONL field that holds the text.
  bad_utf8: `error`, or `replace` by U+FFFD, counted.
  empty: `error`, or `skip`, counted, for documents without a single byte.
  """

  field: str = "text"
  bad_utf8: str = "error"
  empty: str = "error"


class Corpus(Protocol):
  """Documents of tokens with random access.

  lengths_N: int64 number of tokens of each document, borders not counted.
  digests_N: uint64, the first eight bytes of the sha256 of each document's bytes (of its name, for the embedded one).
  digest: hexadecimal sha256 of the whole content.
  """

  lengths_N: np.ndarray
  digests_N: np.ndarray
  digest: str

  def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
    """Token ids [start, stop) of a document."""

  def name(self, document: int) -> str:
    """What messages call the document."""


def paths(patterns: str, option: str) -> list[epath.Path]:
  """The files that comma-separated glob patterns match, sorted by path, each once. Local or remote (`gs://`)."""
  found = {}
  for pattern in filter(None, (part.strip() for part in patterns.split(","))):
    matches = _glob(pattern, option)
    if not matches:
      raise ConfigError(f"no file matches {option}={pattern!r}; give the path of a file or a glob that matches some")
    found |= {str(path): path for path in matches}
  if not found:
    raise ConfigError(f"{option} is empty; give one or more globs, separated by commas")
  return [found[name] for name in sorted(found)]


def is_remote(path: epath.PathLike) -> bool:
  """Whether a path is in an object store."""
  return "://" in os.fspath(path)


def absolute(path: str) -> str:
  """A path or glob that means the same from any directory; `~` is understood, object stores are left as they are."""
  return path if is_remote(path) else os.path.abspath(os.path.expanduser(path))


def _glob(pattern: str, option: str) -> list[epath.Path]:
  """Files that a pattern matches. `**` is for local paths only: in an object store it could list millions."""
  if is_remote(pattern) and "**" in pattern:
    raise ConfigError(f"{option}={pattern!r} cannot be listed: ** is for local paths; write a * for each directory")
  try:
    literal = epath.Path(pattern).expanduser()
    if literal.is_file() or not glob.has_magic(pattern):
      return [literal] if literal.is_file() else []
    if not is_remote(pattern):
      found = [epath.Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True)]
    else:
      root, _, rest = pattern.partition("://")
      bucket, _, rest = rest.partition("/")
      found = list(epath.Path(f"{root}://{bucket}").glob(rest))
    return [path for path in found if path.is_file()]
  except ImportError as error:
    raise ConfigError(f"{option}={pattern!r} needs a package for this kind of path: {error}") from error
  except (OSError, ValueError) as error:  # the latter for a path that holds a NUL
    raise ConfigError(f"{option}={pattern!r} cannot be listed: {error}") from error


def _bytes_of(path: epath.Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as error:
    raise DataError(f"{path} cannot be read: {error}") from error


def _utf8(data: bytes, where: str, line: int, policy: Policy, counts: dict[str, int]) -> bytes:
  """`data` if it is UTF-8; otherwise what the policy says, with the line counted from `line`."""
  try:
    data.decode("utf-8")
    return data
  except UnicodeDecodeError as error:
    if policy.bad_utf8 == "error":
      at = line + data.count(b"\n", 0, error.start)
      raise DataError(
        f"{where}:{at}: not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}); "
        "mend the file, or data.on_bad_utf8=replace"
      ) from error
  counts["bad_utf8_replaced"] = counts.get("bad_utf8_replaced", 0) + 1
  return data.decode("utf-8", "replace").encode("utf-8")


def _keeps(data: bytes, where: str, policy: Policy, counts: dict[str, int]) -> bool:
  """Whether a document is not empty; an empty one is an error or is counted, as the policy says."""
  if data:
    return True
  if policy.empty == "error":
    raise DataError(f"{where} is empty; remove it, or data.on_empty=skip")
  counts["empty_skipped"] = counts.get("empty_skipped", 0) + 1
  return False


def text_documents(files: list[epath.Path], policy: Policy, counts: dict[str, int]) -> Iterator[Document]:
  """One document a file, byte for byte (a byte order mark and CRLF stay as they are)."""
  for path in files:
    data = _bytes_of(path)
    if _keeps(data, str(path), policy, counts):
      yield Document(str(path), _utf8(data, str(path), 1, policy, counts))


def jsonl_documents(files: list[epath.Path], policy: Policy, counts: dict[str, int]) -> Iterator[Document]:
  """One document a line: the string in the policy's field. Blank lines are no documents; lines end at LF only."""
  for path in files:
    seen = False
    with path.open("rb") as file:
      for number, line in enumerate(file, start=1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
          seen = True
          where = f"{path}:{number}"
          data = _field(_utf8(line, str(path), number, policy, counts), where, policy, counts)
          if _keeps(data, where, policy, counts):
            yield Document(where, data)
    if not seen:
      _keeps(b"", str(path), policy, counts)


def _field(line: bytes, where: str, policy: Policy, counts: dict[str, int]) -> bytes:
  try:
    record = json.loads(line.decode("utf-8"))
  except (json.JSONDecodeError, RecursionError) as error:
    raise DataError(f"{where}: not JSON ({error}); every line must be one object") from error
  if not isinstance(record, Mapping):
    raise DataError(f"{where}: a {type(record).__name__}, not an object with the field {policy.field!r}")
  if policy.field not in record:
    raise DataError(f"{where}: no field {policy.field!r}; it has {', '.join(sorted(record)[:20])}; see data.field")
  text = record[policy.field]
  if not isinstance(text, str):
    raise DataError(f"{where}: field {policy.field!r} is a {type(text).__name__}, not a string")
  try:
    return text.encode("utf-8")
  except UnicodeEncodeError as error:  # a lone surrogate, written as an escape
    if policy.bad_utf8 == "error":
      raise DataError(f"{where}: field {policy.field!r} has a lone surrogate; data.on_bad_utf8=replace") from error
  counts["bad_utf8_replaced"] = counts.get("bad_utf8_replaced", 0) + 1
  return re.sub("[\ud800-\udfff]", "\ufffd", text).encode("utf-8")


DOCUMENTS = dict(text=text_documents, jsonl=jsonl_documents)


def embedded_documents() -> list[Document]:
  """The Python language reference that ships inside CPython (`pydoc_data.topics`), without its repetitions.

  About 20 of its 80 topics are sections of another topic, word for word. A topic more than half of whose paragraphs
  (of 60 characters or more) already stand in a larger topic is left out, so that the test split is not in the train
  split. The text differs a little between Python releases; the digest says which one it was.
  """
  from pydoc_data.topics import topics

  seen: set[str] = set()
  kept = []
  for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
    paragraphs = [" ".join(paragraph.split()) for paragraph in topics[name].split("\n\n")]
    paragraphs = [paragraph for paragraph in paragraphs if len(paragraph) >= 60]
    total = sum(map(len, paragraphs))
    if 2 * sum(len(paragraph) for paragraph in paragraphs if paragraph in seen) <= total:
      kept.append(name)
      seen.update(paragraphs)
  return [Document(name, topics[name].encode("utf-8")) for name in sorted(kept)]


def embedded_split(name: str) -> str:
  """The split of a topic of the embedded corpus, by a hash of its name: about 80/10/10.

  The salt is one for which the bytes, and not only the topics, come out in about these proportions.
  """
  share = int.from_bytes(hashlib.sha256(f"20:{name}".encode()).digest()[:8], "big") / 2**64
  return "validation" if share < 0.1 else "test" if share < 0.2 else "train"


class MemoryCorpus:
  """Documents tokenised into one array in memory.

  Raises:
    DataError: for bytes that the tokenizer has no ids for, or ids that its vocabulary does not have, naming the
      document; for a corpus above `limit_mb` megabytes of tokens.
  """

  def __init__(self, documents: Iterable[Document], tokenizer: Tokenizer, limit_mb: int):
    dtype = token_dtype(tokenizer.vocabulary.document)
    pieces, self._names, digests, size = [], [], [], 0
    content = hashlib.sha256()
    for document in documents:
      ids = encode(document, tokenizer)
      size += ids.size * dtype.itemsize
      if size > limit_mb * 2**20:
        raise DataError(
          f"the corpus takes more than data.memory_limit_mb={limit_mb} of memory (at {document.name}); "
          "tokenise it once with python -m thinking_lm.prepare, then data.source=arrayrecord"
        )
      content.update(hashlib.sha256(document.data).digest())
      pieces.append(ids.astype(dtype))
      digests.append(content_digest(document.data))
      self._names.append(document.name)
    self.lengths_N = np.array([len(ids) for ids in pieces], np.int64)
    self.digests_N = np.array(digests, np.uint64)
    self.digest = content.hexdigest()
    self._tokens = np.concatenate(pieces) if pieces else np.zeros(0, dtype)
    self._begins = np.cumsum(self.lengths_N) - self.lengths_N

  def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
    begin = self._begins[document]
    return self._tokens[begin + start : begin + stop]

  def name(self, document: int) -> str:
    return self._names[document]


def content_digest(data: bytes) -> int:
  """The first eight bytes of the sha256 of a document's bytes, as an integer."""
  return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def token_dtype(size: int) -> np.dtype:
  """The smallest unsigned type (or int32) for ids below `size`."""
  return np.dtype(np.uint8 if size <= 2**8 else np.uint16 if size <= 2**16 else np.int32)


def encode(document: Document, tokenizer: Tokenizer) -> np.ndarray:
  """int32 ids of a document, checked: at least one, all in the vocabulary, none the border. Errors name it."""
  try:
    ids = tokenizer.encode(document.data)
  except DataError as error:
    raise DataError(f"{document.name}: {error}") from error
  if not ids.size:
    raise DataError(f"{document.name}: its {len(document.data)} bytes became no token; remove the document")
  if not 0 <= ids.min() <= ids.max() < tokenizer.vocabulary.document:
    raise DataError(
      f"{document.name}: token id {int(ids.min())} or {int(ids.max())} is outside the vocabulary of "
      f"{tokenizer.vocabulary.document} tokens; the tokenizer file is inconsistent"
    )
  return ids


@dataclasses.dataclass(frozen=True)
class Spans:
  """Pieces of documents, in order: a split of a corpus. Three int64 arrays; pieces are never empty."""

  document_N: np.ndarray
  start_N: np.ndarray
  stop_N: np.ndarray

  @classmethod
  def of(cls, document_N, start_N, stop_N) -> "Spans":
    kept = np.asarray(stop_N) > np.asarray(start_N)
    return cls(*(np.asarray(array, np.int64)[kept] for array in (document_N, start_N, stop_N)))


def whole(corpus: Corpus, chosen_N: np.ndarray) -> Spans:
  """The documents where `chosen_N` is true, whole."""
  documents = np.flatnonzero(chosen_N)
  return Spans.of(documents, np.zeros_like(documents), corpus.lengths_N[documents])


def by_hash(corpus: Corpus, validation: float, test: float) -> dict[str, Spans]:
  """Whole documents by their content digest, so that equal documents never end up in different splits."""
  share_N = corpus.digests_N.astype(np.float64) / 2.0**64
  bounds = dict(validation=(0.0, validation), test=(validation, validation + test), train=(validation + test, 2.0))
  return {split: whole(corpus, (share_N >= low) & (share_N < high)) for split, (low, high) in bounds.items()}


def by_tail(corpus: Corpus, validation: float, test: float) -> dict[str, Spans]:
  """Every document by position: the last `test` of it, the `validation` before that, and the rest to train."""
  lengths_N = corpus.lengths_N
  documents, zero_N = np.arange(len(lengths_N)), np.zeros_like(lengths_N)
  test_N = lengths_N - np.floor(lengths_N * test).astype(np.int64)
  validation_N = test_N - np.floor(lengths_N * validation).astype(np.int64)
  return dict(
    train=Spans.of(documents, zero_N, validation_N),
    validation=Spans.of(documents, validation_N, test_N),
    test=Spans.of(documents, test_N, lengths_N),
  )


def by_size(corpus: Corpus, validation: float, test: float) -> dict[str, Spans]:
  """`by_tail` for corpora of fewer than TAIL_BELOW documents, `by_hash` for others."""
  return (by_tail if len(corpus.lengths_N) < TAIL_BELOW else by_hash)(corpus, validation, test)


DIVISIONS = dict(auto=by_size, hash=by_hash, tail=by_tail)
