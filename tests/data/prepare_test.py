"""Prepared corpora: equal to the text they come from, restartable after any kill, and damage is found and named."""

import dataclasses
import itertools
import json
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from thinking_lm import prepare as command
from thinking_lm.data import pipeline, prepared, sources, tokenizer
from thinking_lm.data.pipeline import DataConfig
from thinking_lm.errors import ConfigError, DataError, WorkdirError

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZES = [1, 700, 64, 63, 65, 3, 1200, 128, 5, 400]


def write_corpus(folder, sizes=SIZES):
  """A JSONL file of random text."""
  random = np.random.default_rng(0)
  highest = [127 if size % 64 == 0 else 1000 for size in sizes]  # ASCII: documents that fill their last record
  texts = ["".join(map(chr, random.integers(32, top, size=size))) for size, top in zip(sizes, highest, strict=True)]
  path = folder / "corpus.jsonl"
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  return path


def job_of(path, **changes):
  """A job with shards and records so small that the corpus takes several of both."""
  job = command.Job(
    files=sources.paths(str(path), "--input"),
    format="jsonl",
    policy=sources.Policy(),
    name="bytes",
    encoder=tokenizer.ByteTokenizer(),
    shard_tokens=1000,
    record_tokens=64,
  )
  return dataclasses.replace(job, **changes)


@pytest.fixture
def made(tmp_path):
  """A corpus and what was prepared from it: (input, output directory, manifest)."""
  path = write_corpus(tmp_path)
  return path, tmp_path / "out", command.prepare(job_of(path), f"{tmp_path}/out")


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def opened(folder, **options):
  return prepared.PreparedCorpus(str(folder), tokenizer.ByteTokenizer(), **options)


def test_prepared_equals_text(made):
  path, out, manifest = made
  documents = list(sources.jsonl_documents(sources.paths(str(path), ""), sources.Policy(), {}))
  memory, disk = sources.MemoryCorpus(documents, tokenizer.ByteTokenizer(), 10), opened(out, verify=True)
  assert len(manifest.shards) > 2 and max(shard.records for shard in manifest.shards) > 10
  np.testing.assert_array_equal(disk.lengths_N, memory.lengths_N)
  np.testing.assert_array_equal(disk.digests_N, memory.digests_N)
  random = np.random.default_rng(0)
  for number, length in enumerate(memory.lengths_N):
    cuts = [(0, length), *(sorted(random.integers(0, length + 1, size=2)) for _ in range(30))]
    for start, stop in ((start, stop) for start, stop in cuts if start < stop):
      np.testing.assert_array_equal(disk.tokens(number, start, stop), memory.tokens(number, start, stop))
  assert sum(shard.bytes for shard in manifest.shards) == sum(len(document.data) for document in documents)
  assert disk.name(len(SIZES) - 1).endswith(f"document {manifest.shards[-1].documents - 1}")


@pytest.mark.parametrize("align", [1, 8])
def test_batches_equal_those_of_the_text(made, align):
  path, out, _ = made
  shared = dict(sequence_length=32, align=align, division="hash", validation_fraction=0.3)
  text = pipeline.build(DataConfig(source="jsonl", input=str(path), **shared))
  disk = pipeline.build(DataConfig(source="arrayrecord", input=str(out), verify=True, **shared))
  assert [text.rows(split) for split in sources.SPLITS] == [disk.rows(split) for split in sources.SPLITS]
  both = zip(text.batches("train", global_batch=4), disk.batches("train", global_batch=4), strict=False)
  for ours, theirs in itertools.islice(both, 60):
    for field in dataclasses.fields(ours):
      np.testing.assert_array_equal(getattr(ours, field.name), getattr(theirs, field.name))


def test_text_format_and_counts(tmp_path):
  for name, data in dict(a=b"good", b=b"", c=b"bad\xff").items():
    (tmp_path / name).write_bytes(data)
  policy = sources.Policy(bad_utf8="replace", empty="skip")
  manifest = command.prepare(job_of(tmp_path / "[abc]", format="text", policy=policy), f"{tmp_path}/out")
  assert manifest.counts == dict(bad_utf8_replaced=1, empty_skipped=1)
  corpus = opened(tmp_path / "out")
  assert [bytes(corpus.tokens(number, 0, int(size)).tolist()) for number, size in enumerate(corpus.lengths_N)] == [
    b"good",
    "bad\ufffd".encode(),
  ]


KILLER = """
import os, signal, sys
from thinking_lm.data import sources
left = int(sys.argv[1])
def counted(call):
  def wrapped(*args):
    global left
    left -= 1
    if not left:
      os.kill(os.getpid(), signal.SIGKILL)
    return call(*args)
  return wrapped
os.replace = counted(os.replace)
sources.encode = counted(sources.encode)
from tests.data import prepare_test
from thinking_lm import prepare
prepare.prepare(prepare_test.job_of(sys.argv[2]), sys.argv[3])
"""


def test_killed_anywhere_and_restarted_gives_the_same_bytes(made, tmp_path):
  """SIGKILL at the n-th document or rename, again and again, in one output directory."""
  path, out, _ = made
  codes = []
  for count in (1, 3, 5, 6, 8, 10**9):
    line = [sys.executable, "-c", KILLER, str(count), str(path), f"{tmp_path}/again"]
    codes.append(subprocess.run(line, cwd=ROOT, timeout=120, capture_output=True).returncode)
  assert codes == [-signal.SIGKILL] * 5 + [0]
  assert contents(tmp_path / "again") == contents(out)


def test_a_finished_output_is_verified_and_left_alone(made):
  path, out, manifest = made
  times = {file: file.stat().st_mtime_ns for file in out.iterdir()}
  assert command.prepare(job_of(path), str(out)) == manifest
  assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == times


def test_damaged_shards_are_written_again(made):
  path, out, manifest = made
  before, kept = contents(out), (out / "shard-00000.arrayrecord").stat().st_mtime_ns
  for name in ("shard-00001.arrayrecord", "shard-00002.index.npy"):
    (out / name).write_bytes(before[name][:-1] + b"x")
    assert command.prepare(job_of(path), str(out)) == manifest
    (out / name).unlink()
    assert command.prepare(job_of(path), str(out)) == manifest
    assert contents(out) == before
  assert (out / "shard-00000.arrayrecord").stat().st_mtime_ns == kept


def unfinish(out, shards):
  """Makes an output look as if it had been stopped after some shards."""
  manifest = prepared.read_manifest(epath.Path(out))
  manifest = dataclasses.replace(manifest, complete=False, shards=manifest.shards[:shards])
  prepared.write_manifest(epath.Path(out), manifest)


def test_an_unfinished_output_is_not_read(made):
  _, out, _ = made
  unfinish(out, 1)
  with pytest.raises(DataError, match="is unfinished; run the same"):
    opened(out)


def test_input_that_changed_since_is_noticed(made):
  path, out, _ = made
  unfinish(out, 2)
  content = path.read_text()
  first = json.loads(content.splitlines()[0])["text"]
  swapped = json.dumps({"text": chr(ord(first[0]) + 1)}) + content[content.index("\n") :]
  path.write_text(swapped)
  assert len(swapped) == len(content)
  with pytest.raises(DataError, match=r"corpus.jsonl:1 is not what .*shard-00000.arrayrecord was made from"):
    command.prepare(job_of(path), str(out))


@pytest.mark.parametrize(
  ("changes", "key"),
  [
    (dict(encoder=tokenizer.SymbolTokenizer(["a"])), "tokenizer_digest"),
    (dict(format="text"), "format"),
    (dict(shard_tokens=999), "shard_tokens"),
    (dict(policy=sources.Policy(empty="skip")), "policy"),
    (dict(files=[]), "files"),
  ],
)
def test_the_output_of_another_job_is_refused(made, changes, key):
  path, out, _ = made
  before = contents(out)
  with pytest.raises(ConfigError, match=f"was made by another job: {key} was "):
    command.prepare(job_of(path, **changes), str(out))
  assert contents(out) == before


def test_unusable_outputs(made, tmp_path):
  path, _, _ = made
  with pytest.raises(ConfigError, match=r"is not empty \(corpus.jsonl\) and no output of prepare"):
    command.prepare(job_of(path), str(tmp_path))
  with pytest.raises(WorkdirError, match=f"{path} cannot be written"):
    command.prepare(job_of(path), str(path))
  with pytest.raises(ConfigError, match=r"has no manifest.json; make one"):
    opened(tmp_path)


def test_another_tokenizer_is_refused(made):
  _, out, _ = made
  with pytest.raises(ConfigError, match="was made with another tokenizer, 'bytes'"):
    prepared.PreparedCorpus(str(out), tokenizer.SymbolTokenizer(["a"]))


@pytest.mark.parametrize("kind", ["arrayrecord", "index.npy"])
def test_truncated_missing_and_replaced_files_are_named_when_opened(made, kind):
  _, out, _ = made
  file = out / f"shard-00001.{kind}"
  content = file.read_bytes()
  for bad in (content[:-1], content[: len(content) // 2], b"", content + b"\0"):
    file.write_bytes(bad)
    with pytest.raises(DataError, match=f"{file} has {len(bad)} bytes, the manifest says {len(content)}"):
      opened(out)
  file.unlink()
  with pytest.raises(DataError, match=f"{file} cannot be read"):
    opened(out)


def read_all(corpus):
  return [corpus.tokens(number, 0, int(size)).tolist() for number, size in enumerate(corpus.lengths_N)]


def test_bit_flips_never_pass_unnoticed(made):
  """`verify` finds every flip; without it a flip is found when the record is read, or does no harm."""
  _, out, _ = made
  expected = read_all(opened(out))
  random = np.random.default_rng(0)
  shard, index = out / "shard-00001.arrayrecord", out / "shard-00000.index.npy"
  found = {shard: 0, index: 0}
  for file in [shard] * 30 + [index] * 10:
    original = file.read_bytes()
    content = bytearray(original)
    content[int(random.integers(len(content.rstrip(b"\0"))))] ^= 1 << int(random.integers(8))
    file.write_bytes(content)
    with pytest.raises(DataError, match=str(file)):
      opened(out, verify=True)
    try:
      assert read_all(opened(out)) == expected
    except DataError as error:
      found[file] += 1
      assert file.name in str(error) and "\n" not in str(error)
    file.write_bytes(original)
  assert found[shard] >= 3 and found[index] == 10  # most of so small a shard is padding
  assert read_all(opened(out)) == expected


def test_damaged_manifests(made):
  _, out, _ = made
  file = out / "manifest.json"
  values = json.loads(file.read_text())
  broken = [b"", b"[]", b"{}", file.read_bytes()[:-9], b"\xff", json.dumps(values | {"more": 1}).encode(),
            json.dumps(values | {"format": 9}).encode(), json.dumps(values | {"dtype": "O"}).encode(),
            json.dumps(values | {"shards": [{}]}).encode()]  # fmt: skip
  for content in broken:
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json"):
      opened(out)


def test_remote_shards_are_copied_once_and_checked(made, tmp_path, monkeypatch):
  """With every path taken for a remote one."""
  path, out, _ = made
  monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/cache")
  monkeypatch.setattr(sources, "is_remote", lambda path: str(out) in str(path) or "/far" in str(path))
  assert read_all(opened(out)) == read_all(opened(out))
  assert len(list((tmp_path / "cache/thinking_lm/shards").iterdir())) == len(opened(out)._manifest.shards)
  command.prepare(job_of(path), f"{tmp_path}/far")
  assert contents(tmp_path / "far") == contents(out)
  for file in (tmp_path / "cache/thinking_lm/shards").iterdir():
    file.unlink()
  shard = out / "shard-00000.arrayrecord"
  content = bytearray(shard.read_bytes())
  content[100] ^= 1
  shard.write_bytes(content)
  with pytest.raises(DataError, match=r"shard-00000.arrayrecord is damaged"):
    read_all(opened(out))
  assert not list((tmp_path / "cache/thinking_lm/shards").iterdir())


def run(*arguments):
  line = [sys.executable, "-m", "thinking_lm.prepare", *arguments]
  return subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_command_line(tmp_path):
  path = write_corpus(tmp_path)
  options = [f"--input={path}", f"--output={tmp_path}/out", "--format=jsonl", "--shard_tokens=1000"]
  done = run(*options)
  assert done.returncode == 0, done.stderr
  assert f"{len(SIZES)} documents" in done.stdout
  bad = run(*options[:2], "--format=jsonl", "--field=body", f"--output={tmp_path}/other")
  assert (bad.returncode, bad.stderr) == (65, f"error: {path}:1: no field 'body'; it has text; see data.field\n")
  assert run(f"--output={tmp_path}/x").stderr == "error: --input is missing; see --help\n"
