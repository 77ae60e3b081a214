"""Bytes to token ids and back. Every tokenizer has one more id than its text can produce: the document border.

The border starts every document and is what a document's last token predicts. Because no text encodes to it, a border
found in a row is always a real one.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from etils import epath

from thinking_lm.errors import ConfigError, DataError
from thinking_lm.types import BORDER, Vocabulary

MAX_FILE_BYTES = 64 * 2**20
MAX_SIZE = 2**20
PUNCTUATION = b".!?"
CLOSERS = b"\"')]}"
SPACE = b" \t\n\r\v\f"


class Tokenizer(Protocol):
  """What the pipeline, generation and the checkpoint's digest need of a tokenizer.

  vocabulary: sizes and classes of the ids, `document` included.
  digest: hexadecimal sha256 of everything that decides which ids a text becomes.
  """

  vocabulary: Vocabulary
  digest: str

  def encode(self, data: bytes) -> np.ndarray:
    """int32 ids of `data`, never `vocabulary.document`. Raises DataError for bytes that it has no ids for."""

  def decode(self, ids: Sequence[int]) -> bytes:
    """The bytes of `ids`; the document border stands for none."""


def sentence_class(piece: bytes) -> int:
  """The class (see `types.Vocabulary.sentence_V`) of a token that stands for `piece`.

  3 for sentence punctuation (closing quotes and brackets may follow) and then white space, 1 for punctuation at the
  end, 2 for white space. Subword vocabularies glue a space to the word after it, so that a token that only *starts*
  with white space is 2 as well: the sentence is known to have ended at the first word of the next one, not before
  ("3.14" must not end a sentence).
  """
  core = piece.rstrip(SPACE)
  last = core.rstrip(CLOSERS)[-1:]
  if last and last in PUNCTUATION:
    return 3 if len(core) < len(piece) else 1
  return 2 if piece and piece[:1] in SPACE else 0


def _vocabulary(pieces: Sequence[bytes]) -> Vocabulary:
  return Vocabulary(
    size=len(pieces) + 1,
    document=len(pieces),
    bytes_V=np.array([len(piece) for piece in pieces] + [0], np.int32),
    sentence_V=np.array([sentence_class(piece) for piece in pieces] + [0], np.int8),
    spelling_VW=_spelling(pieces),
  )


def _spelling(pieces: Sequence[bytes]) -> np.ndarray:
  """`types.Vocabulary.spelling_VW` of pieces and the border behind them."""
  table = np.full((len(pieces) + 1, max([1, *map(len, pieces)])), -1, np.int32)
  for row, piece in zip(table, pieces, strict=False):
    row[: len(piece)] = list(piece)
  table[-1, 0] = BORDER
  return table


def _digest(kind: str, content: bytes) -> str:
  return hashlib.sha256(kind.encode() + b"\0" + content).hexdigest()


class ByteTokenizer:
  """Ids 0..255 are the bytes, 256 is the document border. `decode(encode(x)) == x` for any bytes x."""

  def __init__(self):
    self.vocabulary = _vocabulary([bytes([byte]) for byte in range(256)])
    self.digest = _digest("bytes", b"")

  def encode(self, data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8).astype(np.int32)

  def decode(self, ids: Sequence[int]) -> bytes:
    ids = np.asarray(ids)
    return ids[ids != 256].astype(np.uint8).tobytes()


class SymbolTokenizer:
  """One id for each name, in order; texts are names separated by white space. For tasks about abstract symbols.

  A symbol counts as one byte, so that "bits per byte" reads as bits per symbol.
  """

  def __init__(self, names: Sequence[str]):
    self.names = tuple(names)
    self._ids = {name: number for number, name in enumerate(self.names)}
    if len(self._ids) < len(self.names):
      raise ValueError("symbol names repeat")
    size = len(self.names) + 1
    bytes_V = np.append(np.ones(size - 1, np.int32), np.int32(0))
    self.vocabulary = Vocabulary(size, size - 1, bytes_V, np.zeros(size, np.int8))
    self.digest = _digest("symbols", "\n".join(self.names).encode())

  def encode(self, data: bytes) -> np.ndarray:
    names = data.decode().split()
    strange = next((name for name in names if name not in self._ids), None)
    if strange is not None:
      raise DataError(f"unknown symbol {strange!r}; known: {', '.join(self.names[:20])}")
    return np.array([self._ids[name] for name in names], np.int32)

  def decode(self, ids: Sequence[int]) -> bytes:
    return " ".join(self.names[number] for number in ids if number != len(self.names)).encode()


class StandIn:
  """In place of a tokenizer that is not at hand, where only the number of its ids matters. It knows no texts."""

  digest = ""

  def __init__(self, size: int):
    self.vocabulary = Vocabulary(size, 0, np.ones(size, np.int32), np.zeros(size, np.int8))

  def encode(self, text: bytes) -> np.ndarray:
    """Raises DataError."""
    raise DataError("this is the sketch of a run: its tokenizer was not read, so that texts have no tokens")

  def decode(self, tokens: Sequence[int]) -> bytes:
    """Raises DataError."""
    return self.encode(b"")


def _read(path: str) -> bytes:
  try:
    file = epath.Path(path)
    size = file.stat().length
    if size > MAX_FILE_BYTES:
      raise ConfigError(f"tokenizer file {path} has {size} bytes; at most {MAX_FILE_BYTES} are read")
    return file.read_bytes()
  except OSError as error:
    raise ConfigError(f"tokenizer file {path} cannot be read: {error}") from error


def _text(data: bytes) -> str:
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    raise DataError(f"not UTF-8 at byte {error.start}; only data.tokenizer=bytes encodes arbitrary bytes") from error


def _checked_size(size: int, path: str) -> int:
  if not 0 < size <= MAX_SIZE:
    raise ConfigError(f"tokenizer file {path} has {size} tokens; 1 to {MAX_SIZE} are possible")
  return size


@functools.cache
def _byte_of_character() -> dict[str, int]:
  """The character that byte-level BPE vocabularies write for each byte (Radford et al. 2019), inverted.

  Printable Latin-1 characters stand for themselves, the other bytes for the characters from U+0100 on, in order.
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


def _piece_bytes(piece: str, byte_level: bool) -> bytes:
  """The bytes that a vocabulary entry stands for, by the conventions of byte-level BPE or of SentencePiece."""
  table = _byte_of_character()
  if byte_level and all(character in table for character in piece):
    return bytes(table[character] for character in piece)
  if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
    return bytes([int(piece[3:5], 16)])
  return piece.replace("\u2581", " ").encode("utf-8", "replace")


class JsonTokenizer:
  """A `tokenizers` JSON file. Text must be UTF-8; whether it round-trips is up to the file.

  `bytes_V` is exact for byte-level BPE and SentencePiece-like vocabularies, and the length of the entry for others.
  """

  def __init__(self, path: str):
    try:
      import tokenizers
    except ImportError as error:
      raise ConfigError("data.tokenizer=tokenizers:... needs: pip install 'thinking_lm[tokenizers]'") from error
    self._content = _read(path)
    try:
      self._model = tokenizers.Tokenizer.from_str(self._content.decode("utf-8"))
    except Exception as error:  # the library raises bare Exception for every malformed file
      raise ConfigError(f"tokenizer file {path} is not a tokenizers JSON file: {error}") from error
    self._model.no_truncation()
    self._model.no_padding()
    ids = self._model.get_vocab(with_added_tokens=True)
    size = _checked_size(max(ids.values(), default=-1) + 1, path)
    byte_level = "ByteLevel" in type(self._model.decoder).__name__ or "ByteLevel" in str(self._model.pre_tokenizer)
    pieces = [b""] * size
    for piece, number in ids.items():
      pieces[number] = _piece_bytes(piece, byte_level)
    self.vocabulary = _vocabulary(pieces)
    self.digest = _digest("tokenizers", self._content)

  def encode(self, data: bytes) -> np.ndarray:
    return np.array(self._model.encode(_text(data), add_special_tokens=False).ids, np.int32)

  def decode(self, ids: Sequence[int]) -> bytes:
    kept = [int(number) for number in ids if number != self.vocabulary.document]
    return self._model.decode(kept, skip_special_tokens=False).encode("utf-8", "replace")


class SentencePieceTokenizer:
  """A SentencePiece model file. Text must be UTF-8; its own normalisation decides whether text round-trips.

  Control entries of the model (BOS, EOS, padding) are ids that no text produces; the document border is yet another.
  """

  def __init__(self, path: str):
    try:
      import sentencepiece
    except ImportError as error:
      raise ConfigError("data.tokenizer=sentencepiece:... needs: pip install 'thinking_lm[tokenizers]'") from error
    self._content = _read(path)
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_proto=self._content)
    except RuntimeError as error:
      raise ConfigError(f"tokenizer file {path} is not a SentencePiece model: {error}") from error
    size = _checked_size(self._model.get_piece_size(), path)
    silent = [self._model.is_control(number) or self._model.is_unknown(number) for number in range(size)]
    pieces = [self._model.id_to_piece(number) for number in range(size)]
    self.vocabulary = _vocabulary(
      [b"" if quiet else _piece_bytes(piece, False) for piece, quiet in zip(pieces, silent, strict=True)]
    )
    self.digest = _digest("sentencepiece", self._content)

  def encode(self, data: bytes) -> np.ndarray:
    return np.array(self._model.encode(_text(data), out_type=int), np.int32)

  def decode(self, ids: Sequence[int]) -> bytes:
    return self._model.decode([int(number) for number in ids if number != self.vocabulary.document]).encode()


FILE_TOKENIZERS = dict(tokenizers=JsonTokenizer, sentencepiece=SentencePieceTokenizer)


def split_name(name: str) -> tuple[str, str]:
  """The kind and the path of what `data.tokenizer` names; no path for `bytes`."""
  kind, _, path = name.partition(":")
  return kind, path


def from_name(name: str) -> Tokenizer:
  """The tokenizer that `data.tokenizer` names: `bytes`, `tokenizers:PATH` or `sentencepiece:PATH`."""
  if name == "bytes":
    return ByteTokenizer()
  kind, path = split_name(name)
  if kind not in FILE_TOKENIZERS or not path:
    raise ConfigError(f"unknown tokenizer {name!r}; known: bytes, tokenizers:PATH, sentencepiece:PATH")
  return FILE_TOKENIZERS[kind](path)
