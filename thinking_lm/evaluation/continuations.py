"""Texts that an experiment generates: many at a time, as bytes."""

from collections.abc import Callable, Sequence

import jax

from thinking_lm.data.tasks import Example
from thinking_lm.model.generate import Sampling
from thinking_lm.types import Params


def continuations(
  subject,
  params: Params,
  prompts: Sequence[bytes],
  key,
  sampling: Sampling,
  batch_size: int,
  progress: Callable[[int, int], None] | None = None,
) -> list[bytes]:
  """Texts that continue many prompts, sampling.samples of each one after another.

  About `batch_size` are decoded at a time, in prompts of about one length.

  Args:
    subject: an Experiment. progress: (finished, all) -> None, of prompts.
  """
  order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
  G, decode = sampling.samples, subject.data.tokenizer.decode
  at_once, texts = max(1, batch_size // G), {}
  for part, first in enumerate(range(0, len(order), at_once)):
    numbers = order[first : first + at_once]
    filled = [*numbers, *numbers[:1] * (at_once - len(numbers))]  # one shape, one compilation
    made = subject.generate(params, [prompts[n] for n in filled], jax.random.fold_in(key, part), sampling)
    said = [decode(tokens[:length]) for tokens, length in zip(made.tokens_BX, made.length_B, strict=True)]
    texts |= {number: said[row * G : (row + 1) * G] for row, number in enumerate(numbers)}
    if progress is not None:
      progress(len(texts), len(prompts))
  return [text for number in range(len(prompts)) for text in texts[number]]


def answers(subject, params: Params, examples: Sequence[Example], key) -> list[bytes]:
  """Greedy answers to the prompts of a text task, for its verifier."""
  room = max(len(example.answer) for example in examples) + 8
  prompts = [example.prompt for example in examples]
  return continuations(subject, params, prompts, key, Sampling(room, temperature=0.0), len(prompts))
