"""Where a run's data lies: the same from any directory, found again when it moved, and not needed to generate."""

import logging

import jax
import pytest
import tokenizers

from tests import quick
from thinking_lm import experiment
from thinking_lm.errors import ConfigError
from thinking_lm.model.generate import Sampling
from thinking_lm.training import loop


def vocabulary(path, words):
  """A tokenizer file whose tokens are these words."""
  model = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0])
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.save(str(path))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A directory where a run was trained for one step, on relative paths."""
  home = tmp_path_factory.mktemp("home")
  (home / "text").mkdir()
  (home / "text" / "a.txt").write_text("one two three two one three " * 40)
  vocabulary(home / "words.json", ["one", "two", "three"])
  config = experiment.default_config()
  config.data.update(source="text", input="text/*.txt, text/a.txt", tokenizer="tokenizers:words.json", threads=0)
  config.data.sequence_length = 8
  config.model.update(layers=1, width=8, heads=2, kv_heads=1)
  config.train.update(steps=1, batch_size=8, tensorboard=False)
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(home)
    loop.train(experiment.build(experiment.parse(config)).run(), "run")
  return home


def test_a_run_is_read_from_any_directory(home, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  built, _, step = experiment.load(str(home / "run"))
  assert step == 1 and built.data.rows("train")
  assert built.config.data.input == f"{home}/text/*.txt,{home}/text/a.txt"
  assert built.config.data.tokenizer == f"tokenizers:{home}/words.json"


def test_data_that_moved_is_one_line_that_says_how_to_name_the_place(home, tmp_path, caplog):
  (home / "text").rename(home / "elsewhere")
  try:
    with pytest.raises(ConfigError, match=r"no file matches data\.input=.*text.*--data, --valid") as error:
      experiment.load(str(home / "run"))
    assert "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING):
      assert experiment.load(str(home / "run"), places=dict(input=f"{home}/elsewhere/*"))[0].data.rows("train")
      assert not caplog.records
      (tmp_path / "other.txt").write_text("one one two " * 99)
      experiment.load(str(home / "run"), places=dict(input=f"{tmp_path}/*.txt"))
    assert "these rows are not those of the run" in caplog.text
    built = experiment.load(str(home / "run"), rows=False)[0]  # to generate, no corpus is needed
    assert built.data.tokenizer.encode(b"two three").tolist() == [1, 2]
  finally:
    (home / "elsewhere").rename(home / "text")


def test_another_tokenizer_is_refused(home, tmp_path):
  vocabulary(tmp_path / "moved.json", ["one", "two", "three"])
  vocabulary(tmp_path / "other.json", ["three", "two", "one"])
  for rows in (True, False):
    load = lambda file, rows=rows: experiment.load(
      str(home / "run"), rows=rows, places=dict(tokenizer=f"tokenizers:{tmp_path / file}")
    )
    assert load("moved.json")[2] == 1
    with pytest.raises(ConfigError, match="was trained with another tokenizer than tokenizers:/"):
      load("other.json")
    with pytest.raises(ConfigError, match=r"gone\.json cannot be read: .*--tokenizer may name another place"):
      load("gone.json")


THINKS = ("length=2", "kind=latent", "placement=every", "halting=entropy")


def test_a_run_is_asked_to_think_otherwise_while_it_generates(home, monkeypatch):
  """Ends by entropy too, which need no training: at 0 nats there are all think tokens, above every entropy none."""
  changes = [f"--thought={','.join(THINKS)},stop_below=0", "--prompt=one two", "--max_tokens=4", "--temperature=0"]
  words = f"--tokenizer=tokenizers:{home}/words.json"
  code, out, said = quick.command("generate", f"--workdir={home}/run", words, *changes)
  assert code == 0 and "--- 1 of 1: one two" in out, said
  assert "4 real tokens, 8 think tokens" in said
  monkeypatch.chdir(home)
  built, params, _ = experiment.load(str(home / "run"), rows=False)
  subject = built.rethought([*THINKS, "stop_below=99"])
  made = subject.generate(params, [b"one two"], jax.random.key(0), Sampling(4, 0.0))
  assert made.length_B == 4 and not (made.thoughts_BXn >= 0).any()
