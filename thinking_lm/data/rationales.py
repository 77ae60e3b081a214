"""How the answer to a text task is found, step by step, written by a program.

Steps are what a chain of thought in text would say: a curriculum that puts latent thoughts in their place (Coconut)
takes them away one by one, and a verifier can learn to write them before its verdict (GenRM).
"""

import re


def letters(prompt: bytes, modulus: int) -> list[bytes]:
  """last_letter: `tree e`, `axe e`."""
  del modulus
  return [word + b" " + word[-1:] for word in prompt.rstrip(b"=").split()]


def operations(prompt: bytes, modulus: int) -> list[bytes]:
  """modular_arithmetic, from left to right: `3`, `+9 2`, `*2 4`."""
  parts = re.findall(rb"([-+*]?)(\d+)", prompt)
  value, steps = int(parts[0][1]), [parts[0][1]]
  for sign, digits in parts[1:]:
    number = int(digits)
    value = {b"+": value + number, b"-": value - number, b"*": value * number}[sign] % modulus
    steps.append(sign + digits + b" %d" % value)
  return steps


def assignments(prompt: bytes, modulus: int) -> list[bytes]:
  """variable_tracking, after each statement: `a 7`, `b 2`, `a 3`."""
  values: dict[bytes, int] = {}
  steps = []
  for name, other, number in re.findall(rb"([a-z])=(?:([a-z])\+)?(\d+)\.", prompt):
    values[name] = (int(number) + (values[other] if other else 0)) % modulus
    steps.append(name + b" %d" % values[name])
  return steps


STEPS = dict(last_letter=letters, modular_arithmetic=operations, variable_tracking=assignments)
"""task -> (prompt, modulus) -> its steps."""

END = b": "
"""Between the steps and the answer."""


def shown(steps: list[bytes], answer: bytes) -> bytes:
  """Steps and answer as one text: `3, +9 2: 2`."""
  return b", ".join(steps) + END + answer


def final(text: bytes) -> bytes:
  """The answer behind the steps."""
  return text.rsplit(END.strip(), 1)[-1]


def longest(task: str, written: int, modulus: int) -> int:
  """Bytes that so many written steps of a task take at most."""
  digits = len(str(modulus - 1))
  step = dict(last_letter=8, modular_arithmetic=2 * digits + 2, variable_tracking=digits + 2)
  return written * (step[task] + 2) if written else 0
