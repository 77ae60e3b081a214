"""Rewards of sampled answers against byte strings, and against the tasks' own verifiers."""

import itertools
import types

import jax.numpy as jnp
import numpy as np
import pytest

from tests.slow import leaving
from thinking_lm import experiment, recipes
from thinking_lm.data import tasks
from thinking_lm.data.rows import assemble
from thinking_lm.data.tokenizer import _vocabulary
from thinking_lm.errors import ConfigError
from thinking_lm.objectives.rewards import prefix_match, verifier
from thinking_lm.thoughts.answer import answered
from thinking_lm.types import Batch, Layout

PIECES = [b"a", b"b", b"ab", b"ba", b"", b"aab"]
"""The same bytes can be cut in many ways."""


class Said(types.SimpleNamespace):
  """What `answered` reads and writes of a trace."""

  def replace(self, **changes):
    return Said(**(vars(self) | changes))


def rewards(reward, answers_BGNA, batch, anchors_BN, vocabulary, task=None):
  trace = Said(thoughts=types.SimpleNamespace(answer_BGNA=jnp.asarray(answers_BGNA)), answer=None)
  layout = Layout(jnp.asarray(anchors_BN), block=1, blocks=1)
  return np.asarray(reward(answered(trace, batch, layout, vocabulary, task)))


def test_a_prefix_is_of_bytes_and_ends_where_a_token_does():
  vocabulary, T, m = _vocabulary(PIECES), 7, 3
  border, random = vocabulary.document, np.random.default_rng(0)
  spell = lambda tokens: b"".join(b"|" if token == border else PIECES[token] for token in tokens)
  every = np.array(list(itertools.product(range(border + 1), repeat=m)), np.int32)
  targets = random.integers(len(PIECES), size=(6, T)).astype(np.int32)
  targets[:, 4] = border  # the first document's; the second ends with the row, and without one
  segments = np.tile(np.array([1] * 5 + [2] * 2, np.int32), (6, 1))
  weights = np.ones((6, T), np.float32)
  weights[:, 1] = 0
  batch = Batch(targets, targets, weights, segments, segments, np.arange(6, dtype=np.uint32))
  anchors = np.tile(np.array([0, 1, 2, 5, T], np.int32), (6, 1))
  answers = np.broadcast_to(every[None, :, None], (6, len(every), 5, m))
  found = rewards(prefix_match, answers, batch, anchors, vocabulary)
  right = np.zeros(found.shape)
  for b, (n, at) in itertools.product(range(6), enumerate([0, 1, 2, 5])):
    end = 5 if at < 5 else T
    starts = {spell(targets[b, at:stop]) for stop in range(at + 1, end + 1)} - {b""}
    for g, tokens in enumerate(every.tolist()):
      said = spell(tokens[: tokens.index(border) + 1] if border in tokens else tokens)
      right[b, g, n] = said in starts and at != 1
  np.testing.assert_array_equal(found, right)
  assert 0 < right[:, :, [0, 2, 3]].mean() < 0.5
  cut = [(b"ab", [[0, 1]]), (b"aab", [[0, 2], [0, 0, 1]])]  # as tokens these differ from what came
  assert all(spell(other) == text for text, others in cut for other in others)


TASKS = ("modular_arithmetic", "last_letter", "variable_tracking", "parity", "word_problem", "bernoulli_contexts")


@pytest.mark.parametrize("name", leaving(TASKS, ["modular_arithmetic"]))
def test_the_verifier_is_the_tasks_own(name):
  options = tasks.TaskConfig(name=name, length=3, modulus=100)
  task, m = tasks.build(options), 1 if name in tasks.TAGGING else 6
  vocabulary = task.tokenizer.vocabulary
  border, anchors, answers, right = vocabulary.document, [], [], []
  examples = [task.example(0, "train", index) for index in range(8)]
  rows = [(example.tokens, example.targets, example.weights) for example in examples]
  batch = assemble(rows, max(len(row[0]) for row in rows), np.arange(8, dtype=np.uint32), vocabulary)
  for example in examples:
    anchors.append([np.flatnonzero(example.weights)[0]])
    if task.tagging:
      said = [[v] for v in range(vocabulary.size)]
      truth = [task.verify(task.tokenizer.decode(example.targets[:1]), task.tokenizer.decode(v)) for v in said]
    else:
      texts = [
        example.answer,
        b" " + example.answer + b"\n",
        example.answer[:-1],
        example.answer + b"0",
        b"",
        b"7",
        b" ",
      ]
      said = [[*text[:m], *[border] * (m - len(text))] for text in texts]
      said += [[*example.answer, border, *b"12345"][:m], [*example.answer, *b"     "][:m]]
      truth = [task.score(example, ids) for ids in said]
    answers.append(np.array(said, np.int32)[:, None])
    right.append(truth)
  found = rewards(verifier, np.array(answers), batch, np.array(anchors), vocabulary, task)[:, :, 0]
  np.testing.assert_array_equal(found, right)
  assert set(np.ravel(right)) == {0.0, 1.0}


@pytest.mark.parametrize(
  "options,message",
  [
    ({"thought.answer": 0}, "objective.reward 'prefix_match' needs thought.answer above 0"),
    ({"objective.reward": "log_prob"}, "thought.answer 2 is paid by nothing"),
    ({"objective.reward": "verifier"}, "needs a task: data.source 'task' or 'verdicts', got"),
    ({"objective.reward": "verifier", "data.source": "task"}, "'word_problem' asks for one label"),
  ],
)
def test_what_cannot_be_paid_is_refused(options, message):
  config = recipes.apply(recipes.start(experiment.default_config(), "text"), "rpt")
  config.thought.placement, config.thought.answer = "stride", 2
  config.update_from_flattened_dict(options)
  with pytest.raises(ConfigError) as caught:
    experiment.parse(config)
  assert [line for line in caught.value.faults if message in line], caught.value.faults
