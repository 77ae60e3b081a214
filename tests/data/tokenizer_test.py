"""Tokenizers: bytes survive, the border is out of reach of any text, sentence classes are what the glossary says."""

import json
import sys

import numpy as np
import pytest

from thinking_lm.data import tokenizer
from thinking_lm.errors import ConfigError, DataError

NOT_UTF8 = [b"\x85", b"\xff\xfe\x80", b"\xed\xa0\x80"]
AWKWARD = [b"", b"\x00", b"\xef\xbb\xbfa", b"a\r\nb", "\u2028\u00e9\U0001f600".encode(), *NOT_UTF8]


@pytest.fixture(scope="module")
def json_path(tmp_path_factory):
  """A byte-level BPE file, trained on a few sentences."""
  tokenizers = pytest.importorskip("tokenizers")
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=["<|end|>"],
    show_progress=False,
  )
  model.train_from_iterator(["The cat sat. The dog ran."] * 20, trainer)
  end = ("<|end|>", model.token_to_id("<|end|>"))
  model.post_processor = tokenizers.processors.TemplateProcessing(single="$A <|end|>", special_tokens=[end])
  path = tmp_path_factory.mktemp("bpe") / "bpe.json"
  path.write_text(model.to_str())
  return path


@pytest.fixture(scope="module")
def piece_path(tmp_path_factory):
  """A small SentencePiece model with byte fallback."""
  sentencepiece = pytest.importorskip("sentencepiece")
  folder = tmp_path_factory.mktemp("pieces")
  (folder / "text.txt").write_text("the cat sat. the dog ran. a bird sang.\n" * 50)
  sentencepiece.SentencePieceTrainer.train(
    input=str(folder / "text.txt"),
    model_prefix=str(folder / "model"),
    vocab_size=300,
    byte_fallback=True,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  return folder / "model.model"


def test_bytes_round_trip():
  bytes_ = tokenizer.from_name("bytes")
  random = np.random.default_rng(0)
  for data in AWKWARD + [random.bytes(int(size)) for size in random.integers(1, 3000, size=50)]:
    ids = bytes_.encode(data)
    assert ids.dtype == np.int32
    assert bytes_.decode(ids) == data
    assert not (ids == bytes_.vocabulary.document).any()
  assert bytes_.decode([256, 104, 105, 256]) == b"hi"
  assert bytes_.vocabulary.size == 257
  assert bytes_.vocabulary.bytes_V.tolist() == [1] * 256 + [0]


@pytest.mark.parametrize(
  ("piece", "expected"),
  [(b".", 1), (b"!", 1), (b"?", 1), (b'."', 1), (b" end.", 1), (b" ", 2), (b"\n", 2), (b" The", 2), (b". ", 3),
   (b'?"\n', 3), (b"a", 0), (b"3.14", 0), (b"", 0), (b")", 0), (b",", 0)],
)  # fmt: skip
def test_sentence_class(piece, expected):
  assert tokenizer.sentence_class(piece) == expected


def sentence_ends(tokens, vocabulary):
  """The rule of the glossary, by a loop."""
  classes = vocabulary.sentence_V[tokens]
  return [t for t in range(len(tokens)) if classes[t] == 3 or (t and classes[t] == 2 and classes[t - 1] == 1)]


def test_sentences_end_after_the_space_in_bytes_and_at_the_next_word_in_bpe(json_path):
  data = b"The cat sat 3.14 m. The dog ran. The"
  bytes_ = tokenizer.from_name("bytes")
  assert sentence_ends(bytes_.encode(data), bytes_.vocabulary) == [19, 32]
  bpe = tokenizer.from_name(f"tokenizers:{json_path}")
  ids = bpe.encode(data)
  ends = sentence_ends(ids, bpe.vocabulary)
  assert [bpe.decode(ids[: end + 1])[-4:] for end in ends] == [b" The", b" The"]


def test_byte_level_characters_are_the_librarys():
  tokenizers = pytest.importorskip("tokenizers")
  table = tokenizer._byte_of_character()
  assert set(table) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  spell = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
  for text in map(chr, range(2048)):
    ((piece, _),) = spell(text)
    assert bytes(table[character] for character in piece) == text.encode()


def test_json_tokenizer(json_path):
  bpe = tokenizer.from_name(f"tokenizers:{json_path}")
  data = "The cat sat. h\u00e9llo <|end|> \U0001f600\n".encode()
  ids = bpe.encode(data)
  assert bpe.decode(np.append(ids, bpe.vocabulary.document)) == data
  assert bpe.vocabulary.bytes_V[ids].sum() == len(data)
  assert ids.max() < bpe.vocabulary.document == bpe.vocabulary.size - 1
  assert bpe.digest != tokenizer.from_name("bytes").digest
  with pytest.raises(DataError, match="not UTF-8 at byte 1"):
    bpe.encode(b"a\xff")


def test_sentencepiece_tokenizer(piece_path):
  pieces = tokenizer.from_name(f"sentencepiece:{piece_path}")
  data = "the cat sat. \u00e9 <s>".encode()
  ids = pieces.encode(data)
  assert pieces.decode(ids) == data
  assert pieces.vocabulary.bytes_V[ids].sum() == len(data) + 1  # SentencePiece puts a space before the text
  assert ids.max() < pieces.vocabulary.document == pieces.vocabulary.size - 1
  assert pieces.vocabulary.bytes_V[1:3].tolist() == [0, 0]  # <s> and </s>


def test_symbols():
  symbols = tokenizer.SymbolTokenizer(["e", "r", "rr"])
  assert symbols.encode(b"rr e r").tolist() == [2, 0, 1]
  assert symbols.decode([2, 0, 3, 1]) == b"rr e r"
  assert (symbols.vocabulary.size, symbols.vocabulary.document) == (4, 3)
  with pytest.raises(DataError, match="unknown symbol 'x'; known: e, r, rr"):
    symbols.encode(b"e x")
  assert symbols.digest != tokenizer.SymbolTokenizer(["r", "e", "rr"]).digest


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("words", "unknown tokenizer 'words'; known: bytes, tokenizers:PATH, sentencepiece:PATH"),
    ("tokenizers:", "unknown tokenizer"),
    ("tokenizers:missing.json", "missing.json cannot be read"),
    ("sentencepiece:missing.model", "missing.model cannot be read"),
  ],
)
def test_unknown_names(name, message):
  with pytest.raises(ConfigError, match=message):
    tokenizer.from_name(name)


@pytest.mark.parametrize("kind", ["tokenizers", "sentencepiece"])
def test_unusable_files_and_missing_packages(kind, tmp_path, monkeypatch):
  pytest.importorskip(kind)
  path = tmp_path / "file"
  path.write_bytes(json.dumps({"model": 3}).encode())
  with pytest.raises(ConfigError, match=f"{path} is not a"):
    tokenizer.from_name(f"{kind}:{path}")
  monkeypatch.setattr(tokenizer, "MAX_FILE_BYTES", 3)
  with pytest.raises(ConfigError, match="at most 3 are read"):
    tokenizer.from_name(f"{kind}:{path}")
  monkeypatch.setitem(sys.modules, kind, None)
  with pytest.raises(ConfigError, match=r"pip install 'thinking_lm\[tokenizers\]'"):
    tokenizer.from_name(f"{kind}:{path}")
