"""Every thought there is, where these are few enough: what an expectation over thoughts is exactly a sum over.

A private thought is seen by nobody but its own look-ahead, so that all thoughts of an anchor stand for the expectation
there, at every anchor at once. Persistent thoughts see those before them: there it takes all thoughts of all anchors of
a row together, a product over anchors.
"""

import itertools

import numpy as np

LIMIT = 4096
"""Most thoughts that are enumerated."""

HALTING = ("fixed", "stop")
"""The rules of halting under which a thought is its drawn tokens and nothing else."""


def _anchors(config, N: int) -> int:
  """Of how many anchors the thoughts are taken together."""
  return N if config.topology == "persistent" else 1


def number(config, vocabulary_size: int, N: int) -> int:
  """How many there are: V^n of an anchor, and with STOP among them those that end before."""
  V, n = vocabulary_size, config.length
  one = sum(V**k for k in range(n)) + V**n if config.may_stop else V**n
  return one ** _anchors(config, N)


def faults(config, vocabulary_size: int, N: int) -> list[str]:
  """Why the thoughts of rows with room for N anchors are not enumerated; empty where they are."""
  count, together = number(config, vocabulary_size, N), _anchors(config, N)
  if count <= LIMIT:
    return []
  what = f"{vocabulary_size}^{config.length} thoughts of an anchor"
  if together > 1:
    what += f", which persistent thoughts multiply over {together} anchors of a row (thought.cap or private ones help)"
  return [f"exact sums over every thought, at most {LIMIT}: there are {what}"]


def every(config, vocabulary_size: int, stop: int, N: int) -> np.ndarray:
  """tokens_ZNn, int32: all of them, for rows with N anchors; `stop` is the STOP row, and stands behind a STOP."""
  n = config.length
  lengths = range(n + 1) if config.may_stop else [n]
  one_Zn = np.array(
    [
      (*tokens, *[stop] * (n - length))
      for length in lengths
      for tokens in itertools.product(range(vocabulary_size), repeat=length)
    ],
    np.int32,
  ).reshape(-1, n)
  if config.topology == "private":
    return np.repeat(one_Zn[:, None], N, axis=1)
  index_ZN = np.array(list(itertools.product(range(len(one_Zn)), repeat=N)), np.int32).reshape(-1, N)
  return one_Zn[index_ZN]
