"""Scores of a verifier against plain log-probabilities, and choices by hand-made scores."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.quick import command
from thinking_lm import config as config_lib
from thinking_lm import experiment
from thinking_lm.data import verdicts
from thinking_lm.data.rows import assemble
from thinking_lm.errors import ConfigError
from thinking_lm.evaluation import verifiers
from thinking_lm.evaluation.continuations import continuations
from thinking_lm.model.generate import Sampling
from thinking_lm.training import loop
from thinking_lm.types import Carried, Thoughts

KEY = jax.random.key(5, impl="threefry2x32")
LINES = [verdicts.Line(b"p=", b"1", True), *[verdicts.Line(b"q=", c, c == b"5") for c in (b"4", b"4", b"5")]]
SCORES = np.array([0.1, 0.2, 0.3, 0.9])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(Experiment, parameters) of untrained verifiers with sampled thoughts before the verdict."""
  path = tmp_path_factory.mktemp("verdicts") / "v.jsonl"
  rows = [dict(prompt=f"{p}=", candidate=str(c), correct=p == c) for p in range(30) for c in range(2)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  values = experiment.default_config()
  values.data.update(source="verdicts", input=str(path), sequence_length=0)
  values.model.update(layers=1, width=16, heads=2)
  values.thought.update(kind="sampled", length=2, placement="answer", samples=2, lookahead=0, temperature=2.0)
  built = experiment.build(experiment.parse(values))
  return built, jax.jit(built.init)(jax.random.key(1))


def test_a_score_is_yes_against_no_after_the_same_thought(made):
  subject, params = made
  questions = [verdicts.question(line.prompt, line.candidate) for line in LINES]
  scores_XK = verifiers.Scorer(subject, 3)(params, questions, KEY, 2)
  assert scores_XK.shape == (4, 2) and (scores_XK[:, 0] != scores_XK[:, 1]).all()
  rollout = jax.jit(subject.rollout)
  for number, question in enumerate(questions):
    logp = []
    for word in (verdicts.YES, verdicts.NO):
      row = verdicts.example(subject.data.tokenizer, question, word)
      batch = assemble(
        [(row.tokens, row.targets, row.weights)], 32, np.array([number], np.uint32), subject.data.vocabulary
      )
      trace = rollout(params, jax.tree.map(jnp.asarray, batch), jax.random.fold_in(KEY, 1))
      assert int(trace.valid_BN.sum()) == 1
      logp.append(float((trace.logp_BGT[0, 0] * batch.weights_BT[0]).sum()))
    assert scores_XK[number, 1] == pytest.approx(np.exp(logp[0]) / np.exp(logp).sum(), rel=1e-4)


def test_a_thought_in_the_place_of_a_rationale_is_that_text(made):
  """The same bytes as think tokens and as text: the same log-probability of question and verdict, the same policy."""
  subject, params = made
  values = config_lib.to_config_dict(subject.config)
  values.data.verdicts.instead = True
  values.thought.update(length=5, rotary="advance", topology="persistent", temperature=1.0, samples=1)
  thinks = experiment.build(experiment.parse(values))
  values.data.verdicts.update(instead=False, rationale=True, padded=5)
  rationale, tokenizer = b"2,3", subject.data.tokenizer

  def score(data, length):
    (row,) = verdicts.examples([verdicts.Line(b"p=", b"1", True, rationale)], data, tokenizer, train=False)
    batch = assemble([(row.tokens, row.targets, row.weights)], 64, np.array([0], np.uint32), thinks.data.vocabulary)
    batch = jax.tree.map(jnp.asarray, batch)
    thought = dataclasses.replace(thinks.config.thought, length=length)
    tokens = jnp.asarray([*rationale.ljust(5)])[None, None, None]
    given = Thoughts(thinks.model.bind(params).embed(tokens), tokens) if length else None
    return row, thinks.rollout(params, batch, KEY, given, thought)

  inside = thinks.config.data.verdicts
  row, trace = score(inside, 5)
  text_row, text = score(dataclasses.replace(inside, instead=False, rationale=True, padded=5), 0)
  start = int(np.argmax(text_row.weights))
  np.testing.assert_allclose(trace.policy_logp_BGN[0, 0, 0], text.logp_BGT[0, 0, start : start + 5].sum(), rtol=1e-4)
  said = trace.logp_BGT[0, 0, : len(row.tokens)] * row.weights
  np.testing.assert_allclose(said.sum(), text.logp_BGT[0, 0, start + 5 : len(text_row.tokens)].sum(), rtol=1e-4)


def test_generation_thinks_before_the_answer_and_only_there(made):
  subject, params = made
  found = subject.generate(params, [b"1=1\nIs", b"2"], KEY, Sampling(4))
  assert found.thought_BX.tolist() == [[True, False, False, False]] * 2


def test_continuations_keep_the_order_and_fill_the_last_batch(made):
  subject, params = made
  thought = dataclasses.replace(subject.config.thought, length=0)
  subject = dataclasses.replace(subject, config=dataclasses.replace(subject.config, thought=thought))
  prompts = [b"a" * n for n in (9, 1, 40, 2, 3)]
  seen = []
  texts = continuations(subject, params, prompts, KEY, Sampling(3, 0.0), 2, lambda done, of: seen.append((done, of)))
  assert texts == [continuations(subject, params, [p], KEY, Sampling(3, 0.0), 1)[0] for p in prompts]
  assert seen == [(2, 5), (4, 5), (5, 5)]
  pairs = continuations(subject, params, prompts, KEY, Sampling(3, 0.0, samples=2), 4)
  assert pairs == [text for text in texts for _ in range(2)]


def test_written_rationales_are_cut_at_the_question():
  lines = [verdicts.Line(b"1=", b"1", True)]
  (found,) = verifiers.written(lines, lambda heads: [heads[0][-4:] + b"!" + verdicts.QUESTION + b"Yes"])
  assert found == b"1=1\nLet us see: ee: !\nIs this right? "


def test_choices_by_hand():
  choice = verifiers.choose(LINES, SCORES)
  assert [getattr(choice, name).value for name in choice._fields] == [0.5, 0.5, 1.0, 1.0]
  choice = verifiers.choose(LINES, SCORES, most=2)
  assert [getattr(choice, name).value for name in choice._fields] == [0.5, 0.5, 0.5, 0.5]


def test_judgements_by_hand():
  judgement = verifiers.judge(LINES, SCORES)
  assert judgement.accuracy.value == 0.75
  assert judgement.area == pytest.approx((0 + 2) / 4)
  assert judgement.brier.value == pytest.approx((0.81 + 0.04 + 0.09 + 0.01) / 4)
  assert verifiers.judge(LINES[1:3], SCORES[1:3]).area is None
  assert verifiers.area(np.array([0.5, 0.5]), np.array([1, 0])) == 0.5


def test_thinking_before_an_answer_needs_one():
  values = experiment.default_config()
  values.thought.update(length=1, placement="answer")
  with pytest.raises(ConfigError, match="placement 'answer' needs prompts and answers"):
    experiment.parse(values)
  values.data.update(source="task", sequence_length=0)
  with pytest.raises(ConfigError, match="needs prompts and answers"):
    experiment.parse(values)
  values.data.task.name = "last_letter"
  experiment.parse(values)


def test_a_discriminative_verifier_is_a_head_on_the_last_state_with_binary_cross_entropy(made):
  """Score and loss from the decoder's own states, for questions of several lengths."""
  values = config_lib.to_config_dict(made[0].config)
  values.data.verdicts.label, values.thought.length = True, 0
  subject = experiment.build(experiment.parse(values))
  params = jax.jit(subject.init)(jax.random.key(1))
  params["heads"]["verdict"] = dict(weight=jnp.linspace(-1.0, 1.0, 16), bias=jnp.array([0.3]))
  decoder, odds = subject.model.bind(params), []
  questions = [verdicts.question(line.prompt, line.candidate) for line in LINES]
  for question in questions:
    tokens = jnp.array([[[256, *question]]])
    causal = jnp.tril(jnp.ones((tokens.size, tokens.size), bool))[None, None]
    hidden = decoder(decoder.embed(tokens), jnp.arange(tokens.size)[None, None], causal)[0]
    odds.append(float(hidden[0, 0, -1] @ np.linspace(-1, 1, 16) + 0.3))
  scores_XK = verifiers.Scorer(subject, 3)(params, questions, KEY, 1)
  np.testing.assert_allclose(scores_XK[:, 0], 1 / (1 + np.exp(-np.array(odds))), rtol=1e-4)
  rows = verdicts.examples(LINES, subject.config.data.verdicts, subject.data.tokenizer, train=True)
  batch = assemble(
    [(row.tokens, row.targets, row.weights) for row in rows], 32, np.arange(4, dtype=np.uint32), subject.data.vocabulary
  )
  loss, metrics = subject.loss_fn(params, jax.tree.map(jnp.asarray, batch), KEY, Carried())
  signed = np.where([line.correct for line in LINES], odds, -np.array(odds))
  assert float(loss) == pytest.approx(np.log1p(np.exp(-signed)).sum(), rel=1e-4)
  assert float(metrics["accuracy"]) == pytest.approx(np.mean(signed > 0)) and float(metrics["loss"].count) == 4


def test_a_label_has_no_words(made):
  values = config_lib.to_config_dict(made[0].config)
  values.data.verdicts.update(label=True, solutions=0.5)
  values.thought.update(report=1, lookahead=0)
  with pytest.raises(ConfigError) as caught:
    experiment.parse(values)
  assert any("label has no words to learn" in line for line in caught.value.faults)
  values.data.verdicts.solutions = 0.0
  with pytest.raises(ConfigError, match=r"it needs thought\.report 0, got 1"):
    experiment.parse(values)


def test_the_command_evaluates_a_discriminative_verifier(made, tmp_path):
  """Trained for two steps, then `evaluate` as a user would call it."""
  values = config_lib.to_config_dict(made[0].config)
  values.data.verdicts.label, values.thought.length = True, 0
  values.train.update(steps=2, batch_size=8, tensorboard=False)
  built = experiment.build(experiment.parse(values))
  run = tmp_path / "run"
  loop.train(built.run(), str(run))
  code, out, errors = command("evaluate", f"--workdir={run}", "--split=train")
  assert code == 0, errors
  (file,) = (run / "evaluation").glob("train-2.json")
  found = json.loads(file.read_text())
  rows = found["rows"]
  assert found["arms"]["none"]["targets"] == rows > 30 and found["generated"] is None
  sums, examples = found["arms"]["none"], [built.data.task.example(0, "train", i) for i in range(rows)]
  subject, params, _ = experiment.load(str(run))
  scores_X = verifiers.Scorer(subject, rows)(params, [example.prompt for example in examples], KEY, 1)[:, 0]
  right = np.mean((scores_X > 0.5) == [example.answer == verdicts.YES for example in examples])
  assert sums["accuracy"][0] == sums["whole_examples"][0] == pytest.approx(right)
  assert found["calibration"]["forecasters"]["softmax"]["accuracy"][0] == pytest.approx(sums["accuracy"][0])
  assert f"train: {rows} rows" in out
