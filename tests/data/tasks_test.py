"""Tasks against oracles that work differently, and what their verifiers accept."""

import itertools
import re

import numpy as np
import pytest

from thinking_lm.data import tasks
from thinking_lm.data.tasks import TASKS, TaskConfig
from thinking_lm.errors import ConfigError

GROUPS = ["Z2", "Z7", "Z60", "S2", "S3", "S5", "A4", "A5"]
ORDERS = dict(Z2=2, Z7=7, Z60=60, S2=2, S3=6, S5=120, A4=12, A5=60)


def arithmetic(prompt):
  """Left to right, with integers of any size and one reduction at the end."""
  total = 0
  for sign, operand in re.findall(r"([+*-]?)(\d+)", prompt):
    number = int(operand)
    total = {"": number, "+": total + number, "-": total - number, "*": total * number}[sign]
  return total


def tracked(prompt, modulus):
  """The asked variable, by following its definition backwards."""
  *statements, question = prompt.split(". ")

  def value(name, before):
    for number in reversed(range(before)):
      left, _, right = statements[number].partition("=")
      if left == name:
        if right.isdigit():
          return int(right)
        other, _, added = right.partition("+")
        return value(other, number) + int(added)
    raise AssertionError(f"{name} is read before it is set in {prompt}")

  return value(question.rstrip("?"), len(statements)) % modulus


ANSWERS = dict(
  modular_arithmetic=lambda prompt, modulus: str(arithmetic(prompt) % modulus),
  last_letter=lambda prompt, modulus: "".join(word[-1] for word in prompt.rstrip("=").split(" ")),
  variable_tracking=lambda prompt, modulus: str(tracked(prompt, modulus)),
  parity=lambda prompt, modulus: str(prompt.count("+") % 2),
)
TEXT_CASES = list(itertools.product(ANSWERS, [1, 2, 9], [2, 10, 1000]))


@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_groups(name):
  names, table = tasks.parse_group(name)
  n = ORDERS[name]
  assert len(set(names)) == len(names) == n
  assert all(len(set(line)) == n for line in [*table.tolist(), *table.T.tolist()])
  random = np.random.default_rng(0)
  a, b, c = random.integers(n, size=(3, 500))
  np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
  assert (table == table.T).all() == (name[0] == "Z" or n == 2)


@pytest.mark.parametrize("name", GROUPS)
def test_word_problem_labels_are_running_products(name):
  """For permutations by moving points one after the other, for Zn by sums."""
  task = tasks.build(TaskConfig(group=name, length=9))
  for index in range(20):
    example = task.example(3, "train", index)
    symbols, labels = example.prompt.decode().split(), example.answer.decode().split()
    for t, label in enumerate(labels):
      if name[0] == "Z":
        assert int(label) == sum(map(int, symbols[: t + 1])) % ORDERS[name]
      else:
        for point in range(len(label)):
          moved = point
          for symbol in symbols[: t + 1]:
            moved = int(symbol[moved])
          assert int(label[point]) == moved
    assert task.tokenizer.decode(example.tokens) == example.prompt
    assert task.tokenizer.decode(example.targets) == example.answer
    assert example.weights.tolist() == [1.0] * 9


@pytest.mark.parametrize(("name", "length", "modulus"), TEXT_CASES)
def test_text_tasks_are_right(name, length, modulus):
  task = tasks.build(TaskConfig(name=name, length=length, modulus=modulus))
  sizes = []
  for index in range(100):
    example = task.example(0, "train", index)
    assert example.answer.decode() == ANSWERS[name](example.prompt.decode(), modulus)
    sizes.append(len(example.tokens))
  assert max(sizes) <= task.longest(length)


@pytest.mark.parametrize("name", sorted(ANSWERS))
@pytest.mark.parametrize("weigh_prompt", [False, True])
def test_text_layout(name, weigh_prompt):
  """Border, prompt, answer in; the same shifted and a border out; weight on the answer and the border that ends it."""
  task = tasks.build(TaskConfig(name=name, length=3, weigh_prompt=weigh_prompt))
  example = task.example(0, "validation", 5)
  text = list(example.prompt + example.answer)
  assert example.tokens.tolist() == [256, *text]
  assert example.targets.tolist() == [*text, 256]
  unweighted = 0 if weigh_prompt else len(example.prompt)
  assert example.weights.tolist() == [0.0] * unweighted + [1.0] * (len(text) + 1 - unweighted)


def test_bernoulli_labels_have_their_contexts_probability():
  task = tasks.build(TaskConfig(name="bernoulli_contexts", length=2000, contexts=5))
  example = task.example(0, "train", 0)
  assert task.tokenizer.decode(example.tokens[:3]).decode().startswith("c")
  for c, p in enumerate((0.1, 0.3, 0.5, 0.7, 0.9)):
    labels = example.targets[example.tokens == 2 + c]
    assert abs(labels.mean() - p) < 4 * (p * (1 - p) / len(labels)) ** 0.5 and 300 < len(labels) < 500


@pytest.mark.parametrize("name", sorted(TASKS))
def test_examples_depend_on_seed_split_and_index_alone(name):
  task = tasks.build(TaskConfig(name=name, length=20))
  keys = list(itertools.product([0, 1], ["train", "validation", "test"], range(10)))
  first = [task.example(*key).prompt for key in keys]
  again = [tasks.build(TaskConfig(name=name, length=20)).example(*key).prompt for key in reversed(keys)]
  assert first == again[::-1]
  assert len(set(first)) == len(keys)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_tagging_task_has_labels_and_any_other_the_next_tokens(name):
  task = tasks.build(TaskConfig(name=name, length=20))
  examples = [task.example(0, "train", index) for index in range(5)]
  assert task.tagging != all((example.tokens[1:] == example.targets[:-1]).all() for example in examples)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_verifiers(name):
  task = tasks.build(TaskConfig(name=name, length=4))
  example = task.example(0, "test", 0)
  assert task.score(example, example.answer) == 1.0
  ids = task.tokenizer.encode(example.answer)
  border = task.tokenizer.vocabulary.document
  assert task.score(example, ids) == 1.0
  assert task.score(example, [*ids, border, 0, 0]) == 1.0
  assert task.score(example, b"") == 0.0
  assert 0.0 <= task.score(example, [border]) <= task.score(example, ids[:-1]) < 1.0
  assert task.score(example, [*ids, ids[0]]) < 1.0


def test_steps_are_looked_for_only_where_they_are_written():
  task = tasks.build(TaskConfig(name="parity", length=4))
  shown = task.example(0, "test", 0)
  assert task.score(shown, b"9: " + shown.answer) == task.score(shown, b":" + shown.answer) == 0.0


def test_label_accuracy_is_a_share():
  task = tasks.build(TaskConfig(group="Z2", length=4))
  example = task.example(0, "test", 0)
  flipped = example.targets.copy()
  flipped[1] ^= 1
  assert task.score(example, flipped) == 0.75


def test_lengths_and_counts_by_split():
  task = tasks.build(TaskConfig(length=4, eval_length=7, train_examples=50, eval_examples=9))
  assert [len(task.example(0, split, 0).tokens) for split in ("train", "validation", "test")] == [4, 7, 7]
  assert [task.count(split) for split in ("train", "validation", "test")] == [50, 9, 9]


@pytest.mark.parametrize("group", ["Z1", "Z721", "S1", "S7", "A2", "D4", "", "Z", "z3", "Z2x"])
def test_unknown_groups(group):
  assert "known: Z2" in TaskConfig(group=group).faults()[0]
  with pytest.raises(ConfigError, match="unknown group"):
    tasks.build(TaskConfig(group=group))
