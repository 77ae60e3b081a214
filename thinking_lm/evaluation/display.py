r"""The one way out for text that a model wrote or a data set holds: nothing in it can steer a terminal.

Model output is untrusted. What is not printable becomes its escape (`\x1b`), bytes that are no UTF-8 become U+FFFD.
"""

import codecs
import unicodedata
from collections.abc import Callable, Sequence

from thinking_lm.model.generate import Generation

UNSAFE = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
"""Unicode categories that are escaped: controls, direction overrides, surrogates, unassigned, line separators."""


def safe(data: bytes) -> str:
  """Text for a terminal: printable characters, newlines and tabs; everything else as an escape."""
  text = data.decode("utf-8", errors="replace")
  return "".join(
    c if c in "\n\t" or unicodedata.category(c) not in UNSAFE else c.encode("unicode_escape").decode() for c in text
  )


def inline(data: bytes) -> str:
  """`safe`, on one line."""
  return safe(data).replace("\n", "\\n").replace("\t", "\\t")


def continuation(
  tokenizer,
  generation: Generation,
  row: int,
  thoughts: bool,
  colour: bool,
  confidence: Callable[[int], float | None] = lambda token: None,
) -> str:
  """A row's generated text; with `thoughts`, each thought stands in brackets before the token it led to.

  A latent or pause thought shows the real tokens that the head reads off its think slots, one that reports ends in
  `P("a")=0.7` for each pair, as it was said.

  Args:
    confidence: what a token of a report stands for, None for other tokens; see `Model.confidence`.
  """
  length = int(generation.length_B[row])
  tokens = generation.tokens_BX[row]
  if not thoughts:
    return safe(tokenizer.decode(tokens[:length]))
  opening, closing = ("\x1b[2m⟨", "⟩\x1b[0m") if colour else ("⟨", "⟩")
  pieces, characters, before = [], codecs.getincrementaldecoder("utf-8")("replace"), b""
  for i in range(min(length + 1, len(tokens))):
    if generation.thought_BX[row, i]:
      pieces.append(opening + inline(_words(tokenizer, generation.thoughts_BXn[row, i], confidence)) + closing)
    if i < length:
      after = tokenizer.decode(tokens[: i + 1])  # what a token adds can depend on those before it
      pieces.append(safe(characters.decode(after[len(before) :]).encode()))
      before = after
  return "".join(pieces)


def pairs(tokens: Sequence[int], confidence: Callable[[int], float | None]) -> list[tuple[int, float]]:
  """The candidates of a thought's report and how sure it says it is of each."""
  tokens = [int(token) for token in tokens if token >= 0]
  sure = [confidence(token) for token in tokens]
  return [(tokens[i - 1], said) for i, said in enumerate(sure) if i and said is not None]


def _words(tokenizer, tokens: Sequence[int], confidence) -> bytes:
  border = tokenizer.vocabulary.document
  said = pairs(tokens, confidence)
  tokens = [int(token) for token in tokens if token >= 0]
  word = lambda token: b"|" if token == border else tokenizer.decode([token])
  free = b"".join(map(word, tokens[: len(tokens) - 2 * len(said)]))
  report = b", ".join(b'P("%s")=%.3g' % (word(token), sure) for token, sure in said)
  return b" ".join(filter(None, (free, report))) if said else free
