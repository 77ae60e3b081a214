"""Text of a model on its way to a terminal."""

import numpy as np

from thinking_lm.data.tokenizer import ByteTokenizer
from thinking_lm.evaluation.display import continuation, inline, pairs, safe
from thinking_lm.model.generate import Generation

TOKENIZER = ByteTokenizer()


def made(text: bytes, thoughts: dict[int, list[int]]):
  """One continuation, two think tokens a thought, and the border behind it."""
  X = len(text) + 1
  shown = np.full((1, X, 2), -1, np.int32)
  for i, tokens in thoughts.items():
    shown[0, i, : len(tokens)] = tokens
  return Generation(
    tokens_BX=np.array([[*text, 256]]),
    logp_BX=np.zeros((1, X)),
    length_B=np.array([len(text)]),
    thought_BX=np.array([[i in thoughts for i in range(X)]]),
    thoughts_BXn=shown,
  )


def test_nothing_can_steer_a_terminal():
  assert safe(b"a\x1b[2Jb\x00\xff\n\tc") == "a\\x1b[2Jb\\x00\ufffd\n\tc"
  assert safe("\u202eabc\u2028".encode()) == "\\u202eabc\\u2028"
  assert inline(b"a\nb\t") == "a\\nb\\t"


def test_thoughts_stand_before_the_token_they_led_to():
  generation = made(b"abc", {0: [ord("x"), ord("\n")], 2: [256, ord("y")], 3: [ord("z")]})
  assert continuation(TOKENIZER, generation, 0, thoughts=False, colour=False) == "abc"
  assert continuation(TOKENIZER, generation, 0, thoughts=True, colour=False) == "⟨x\\n⟩ab⟨|y⟩c⟨z⟩"
  assert continuation(TOKENIZER, generation, 0, thoughts=True, colour=True).startswith("\x1b[2m⟨x")


def test_a_report_is_read_as_probabilities():
  said = [ord("x"), -1, ord("a"), 1007, 256, 1000, ord("\n"), 1010]
  generation = made(b"a", {}).replace(thought_BX=np.array([[True, False]]), thoughts_BXn=np.array([[said, [-1] * 8]]))
  confidence = lambda token: (token - 1000) / 10 if token >= 1000 else None
  assert pairs(said, confidence) == [(ord("a"), 0.7), (256, 0.0), (ord("\n"), 1.0)]
  text = continuation(TOKENIZER, generation, 0, thoughts=True, colour=False, confidence=confidence)
  assert text == '⟨x P("a")=0.7, P("|")=0, P("\\n")=1⟩a'


def test_a_character_of_several_bytes_is_shown_whole():
  text = "é—x".encode()
  assert continuation(TOKENIZER, made(text, {}), 0, thoughts=True, colour=False) == "é—x"
