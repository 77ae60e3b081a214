"""Documents and splits: nothing is lost or leaks, and every bad input is one line that names the thing."""

import json

import numpy as np
import pytest

from thinking_lm.data import pipeline, sources, tokenizer
from thinking_lm.data.pipeline import DataConfig
from thinking_lm.errors import ConfigError, DataError


def write(folder, files):
  """Writes {name: bytes} and returns the folder."""
  for name, data in files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
  return folder


def corpus(texts):
  """An in-memory corpus of byte strings."""
  documents = [sources.Document(str(number), text) for number, text in enumerate(texts)]
  return sources.MemoryCorpus(documents, tokenizer.ByteTokenizer(), 100)


def test_globs_are_sorted_and_each_file_is_read_once(tmp_path):
  write(tmp_path, {"b.txt": b"B", "a.txt": b"A", "sub/c.txt": b"C", "d.md": b"D"})
  found = sources.paths(f"{tmp_path}/*.txt, {tmp_path}/b.txt,{tmp_path}/**/c.txt", "data.input")
  assert [path.name for path in found] == ["a.txt", "b.txt", "c.txt"]
  documents = sources.text_documents(found, sources.Policy(), {})
  assert [document.data for document in documents] == [b"A", b"B", b"C"]


def test_relative_globs(tmp_path, monkeypatch):
  monkeypatch.chdir(write(tmp_path, {"a.txt": b"A", "sub/b.txt": b"B"}))
  assert [str(path) for path in sources.paths("*.txt", "data.input")] == ["a.txt"]
  assert [str(path) for path in sources.paths("sub/*", "data.input")] == ["sub/b.txt"]


def test_patterns_that_cannot_be_listed_are_told():
  with pytest.raises(ConfigError, match=r"data.input='gs://bucket/\*\*/x' cannot be listed: \*\* is for local paths"):
    sources.paths("gs://bucket/**/x", "data.input")
  with pytest.raises(ConfigError, match="cannot be listed: embedded null byte"):
    sources.paths("\0/*", "data.input")


def test_text_is_kept_byte_for_byte(tmp_path):
  texts = [b"\xef\xbb\xbfbom", b"a\r\nb\x00", "\u2028\x85\u00e9".encode(), b" "]
  write(tmp_path, {f"{number}.txt": text for number, text in enumerate(texts)})
  found = sources.paths(f"{tmp_path}/*", "data.input")
  assert [document.data for document in sources.text_documents(found, sources.Policy(), {})] == texts


def test_jsonl_lines_end_at_lf_only(tmp_path):
  texts = ["one", "two\nlines", "\u2028\x85", "  "]
  lines = [json.dumps({"body": text, "id": 1}, ensure_ascii=False) for text in texts]
  write(tmp_path, {"a.jsonl": b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode()})
  found = sources.paths(f"{tmp_path}/a.jsonl", "data.input")
  documents = list(sources.jsonl_documents(found, sources.Policy(field="body"), {}))
  assert [document.data.decode() for document in documents] == texts
  assert documents[1].name == f"{tmp_path}/a.jsonl:3"


BAD = {
  "no file": ("text", {}, ConfigError, "no file matches data.input="),
  "empty file": ("text", {"x": b""}, DataError, "/x is empty; remove it, or data.on_empty=skip"),
  "bad bytes": ("text", {"x": b"ab\ncd\n\xc3("}, DataError, r"/x:3: not UTF-8 \(byte 0xc3 at offset 6\)"),
  "one token": ("text", {"x": b"a"}, DataError, "/x: the whole of data.input is one token"),
  "empty jsonl": ("jsonl", {"x": b"\n\n"}, DataError, "/x is empty"),
  "bad json": ("jsonl", {"x": b'{"text": "a"}\n{"text": '}, DataError, "/x:2: not JSON"),
  "deep json": ("jsonl", {"x": b"[" * 100000}, DataError, "/x:1: not JSON"),
  "no object": ("jsonl", {"x": b"[1]"}, DataError, "/x:1: a list, not an object"),
  "no field": ("jsonl", {"x": b'{"body": "a", "a": 1}'}, DataError, "/x:1: no field 'text'; it has a, body"),
  "not a string": ("jsonl", {"x": b'{"text": 3}'}, DataError, "/x:1: field 'text' is a int, not a string"),
  "null": ("jsonl", {"x": b'{"text": null}'}, DataError, "/x:1: field 'text' is a NoneType"),
  "empty text": ("jsonl", {"x": b'{"text": "a"}\n{"text": ""}'}, DataError, "/x:2 is empty"),
  "bad bytes in jsonl": ("jsonl", {"x": b'{"text": "a"}\n{"text": "\xff"}'}, DataError, "/x:2: not UTF-8"),
  "surrogate": ("jsonl", {"x": b'{"text": "\\ud800"}'}, DataError, "/x:1: field 'text' has a lone surrogate"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, tmp_path):
  source, files, error, message = BAD[case]
  write(tmp_path, files)
  with pytest.raises(error, match=message) as caught:
    pipeline.build(DataConfig(source=source, input=f"{tmp_path}/*"))
  assert "\n" not in str(caught.value)


def test_mending_is_counted(tmp_path):
  write(tmp_path, {"a": b"ab\xff" * 20, "b": b"", "c": b"good" * 20})
  data = pipeline.build(DataConfig(source="text", input=f"{tmp_path}/*", on_bad_utf8="replace", on_empty="skip"))
  assert data.counts == dict(bad_utf8_replaced=1, empty_skipped=1)
  write(tmp_path / "j", {"a": b'{"text": "x\\ud800y"}\n{"text": ""}\n{"text": "\xff"}'})
  data = pipeline.build(DataConfig(source="jsonl", input=f"{tmp_path}/j/*", on_bad_utf8="replace", on_empty="skip"))
  assert data.counts == dict(bad_utf8_replaced=2, empty_skipped=1)
  policy = sources.Policy(bad_utf8="replace", empty="skip")
  documents = sources.jsonl_documents(sources.paths(f"{tmp_path}/j/*", ""), policy, {})
  assert [document.data.decode() for document in documents] == ["x\ufffdy", "\ufffd"]


def test_nothing_left_after_skipping(tmp_path):
  write(tmp_path, {"a": b"", "b": b""})
  with pytest.raises(DataError, match="has no documents left; 2 were empty"):
    pipeline.build(DataConfig(source="text", input=f"{tmp_path}/*", on_empty="skip"))


def test_memory_limit(tmp_path):
  write(tmp_path, {"a": b"x" * 2**20, "b": b"y"})
  with pytest.raises(DataError, match=r"memory_limit_mb=1 of memory \(at .*/b\); tokenise it once"):
    pipeline.build(DataConfig(source="text", input=f"{tmp_path}/*", memory_limit_mb=1))


def test_token_ids_are_checked_against_the_vocabulary():
  class Broken(tokenizer.ByteTokenizer):
    def encode(self, data):
      return super().encode(data) + 1

  with pytest.raises(DataError, match="bad: token id 98 or 256 is outside the vocabulary of 256 tokens"):
    sources.MemoryCorpus([sources.Document("bad", b"a\xff")], Broken(), 1)


def pieces(part, whole):
  """(document, tokens) of a split's spans."""
  spans = zip(part.document_N, part.start_N, part.stop_N, strict=True)
  return [(int(number), whole.tokens(number, start, stop).tobytes()) for number, start, stop in spans]


def test_hash_division_keeps_documents_whole_and_equal_ones_together():
  texts = [f"text {number % 200}".encode() for number in range(400)]
  whole = corpus(texts)
  parts = {split: pieces(part, whole) for split, part in sources.by_hash(whole, 0.2, 0.1).items()}
  contents = {split: {text for _, text in part} for split, part in parts.items()}
  assert sum(len(part) for part in parts.values()) == 400
  assert not contents["train"] & contents["validation"] and not contents["train"] & contents["test"]
  assert 20 <= len(contents["validation"]) <= 60 and 8 <= len(contents["test"]) <= 32
  assert {number for number, _ in parts["train"]}.isdisjoint(number for number, _ in parts["test"])
  assert [len(part.document_N) for part in sources.by_hash(whole, 0.0, 0.0).values()] == [0, 0, 400]


def test_tail_division_cuts_every_document_in_three():
  texts = [bytes(range(100)), b"abc", b"z"]
  whole = corpus(texts)
  parts = {split: dict(pieces(part, whole)) for split, part in sources.by_tail(whole, 0.2, 0.1).items()}
  assert [len(parts[split][0]) for split in sources.SPLITS] == [70, 20, 10]
  assert parts["train"][2] == b"z"
  for number, text in enumerate(texts):
    assert b"".join(parts[split].get(number, b"") for split in sources.SPLITS) == text


def test_few_documents_are_cut_and_many_are_not(tmp_path):
  write(tmp_path, {"a.txt": b"x" * 10000})
  data = pipeline.build(DataConfig(source="text", input=f"{tmp_path}/a.txt", sequence_length=100))
  assert [data.rows(split) for split in sources.SPLITS] == [91, 6, 6]
  for count in (sources.TAIL_BELOW - 1, sources.TAIL_BELOW):
    whole = corpus([b"document" * 10] * count)
    assert (len(sources.by_size(whole, 0.1, 0.1)["validation"].document_N) == count) == (count < sources.TAIL_BELOW)


def test_documents_stay_whole_where_each_is_a_row(tmp_path):
  texts = {f"{number}": f"document {number} ".encode() * 10 for number in range(20)}
  write(tmp_path, texts)
  data = pipeline.build(DataConfig(source="text", input=f"{tmp_path}/*", packing=False, test_fraction=0.2))
  rows = [data.splits[split].read(index)[0] for split in sources.SPLITS for index in range(data.rows(split))]
  assert {data.tokenizer.decode(row) for row in rows} == set(texts.values())


def test_own_validation_files(tmp_path):
  write(tmp_path, {"t1": b"train one", "t2": b"both", "v1": b"both", "v2": b"valid"})
  options = DataConfig(
    source="text", input=f"{tmp_path}/t*", validation_input=f"{tmp_path}/v*", test_fraction=0.0, packing=False
  )
  data = pipeline.build(options)
  assert [data.rows(split) for split in sources.SPLITS] == [2, 2, 0]
  assert data.counts == dict(validation_documents_in_train=1)
  with pytest.raises(DataError, match=r"test has no rows; see data.test_input and data.test_fraction"):
    data.evaluation_batches("test", batch_size=2)


def test_train_without_documents(tmp_path):
  write(tmp_path, {"a": b"only one"})
  with pytest.raises(DataError, match=r"train has no documents: all 1 of data.input went to validation"):
    for salt in range(50):  # a share of 0.9 takes nearly every document
      write(tmp_path, {"a": f"only one {salt}".encode()})
      options = dict(division="hash", validation_fraction=0.9, test_fraction=0.05)
      pipeline.build(DataConfig(source="text", input=f"{tmp_path}/a", **options))


def paragraphs(documents):
  """Long paragraphs of documents, without their line breaks."""
  found = [" ".join(part.split()) for document in documents for part in document.data.decode().split("\n\n")]
  return {part for part in found if len(part) >= 60}


def test_embedded_corpus_splits_by_topic_and_leaks_nothing():
  documents = sources.embedded_documents()
  parts = {split: [d for d in documents if sources.embedded_split(d.name) == split] for split in sources.SPLITS}
  sizes = {split: sum(len(document.data) for document in part) for split, part in parts.items()}
  total = sum(sizes.values())
  assert total > 300_000
  assert 0.7 < sizes["train"] / total < 0.85
  assert all(0.07 < sizes[split] / total < 0.15 for split in ("validation", "test"))
  train = paragraphs(parts["train"])
  for split in ("validation", "test"):
    held_out = paragraphs(parts[split])
    assert len(held_out & train) < 0.02 * len(held_out)


def test_config_faults():
  def faults(**values):
    return DataConfig(**values).faults()

  assert not faults() and not faults(source="task", sequence_length=0) and not faults(source="text", input="x")
  assert "sequence_length=0 is for source=task" in faults(sequence_length=0)[0]
  assert "input is not read with source=default" in faults(input="x")[0]
  assert "source=jsonl needs input" in faults(source="jsonl")[0]
  assert "at most 0.95" in faults(validation_fraction=0.6, test_fraction=0.5)[0]


def test_token_dtypes():
  assert [sources.token_dtype(size) for size in (256, 257, 2**16, 2**16 + 1)] == [
    np.uint8, np.uint16, np.uint16, np.int32,
  ]  # fmt: skip
