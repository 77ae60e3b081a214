"""Written steps lead to the answer, are as long as promised, and are taken away from the front."""

import pytest

from thinking_lm import config as config_lib
from thinking_lm.data import rationales, tasks
from thinking_lm.errors import ConfigError


def task(name, **changes):
  """A task with written steps."""
  return tasks.build(tasks.TaskConfig(name=name, length=4, modulus=12, **changes))


@pytest.mark.parametrize("name", rationales.STEPS)
def test_steps_end_in_the_answer_and_the_score_reads_only_that(name):
  plain, full = task(name), task(name, written=4)
  for index in range(30):
    example, shown = plain.example(0, "train", index), full.example(0, "train", index)
    steps = rationales.STEPS[name](example.prompt, 12)
    assert len(steps) == 4 and shown.prompt == example.prompt
    assert shown.answer == b", ".join(steps) + b": " + example.answer
    assert task(name, written=2).example(0, "train", index).answer == rationales.shown(steps[2:], example.answer)
    last = b"".join(step[-1:] for step in steps) if name == "last_letter" else example.answer
    said = [step.split()[-1] for step in steps]
    assert last == example.answer and (name == "last_letter" or example.answer in said)
    assert full.score(shown, b"anything: " + example.answer) == full.score(shown, example.answer) == 1
    assert full.score(shown, b"anything: x") == 0
    assert len(shown.tokens) <= full.longest(4)


def test_tasks_without_steps_cannot_write_them():
  with pytest.raises(ConfigError, match="written is for tasks whose steps a program can write: last_letter"):
    config_lib.parse(tasks.TaskConfig, dict(written=1))
