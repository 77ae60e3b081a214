"""Scores a model with its own thoughts, with others' in their place, and without, on the same tokens.

Teacher forcing throughout: real tokens are the data's, and a prediction is right when the target is the most likely
real token. What is generated freely comes in through `evaluate`'s `answer`.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from thinking_lm.config import pick
from thinking_lm.data import tasks
from thinking_lm.errors import ConfigError
from thinking_lm.evaluation.calibration import Calibration, calibrate, joined
from thinking_lm.evaluation.controls import CONTROLS, NONE, Source, counted, latest
from thinking_lm.evaluation.difficulty import Difficulty
from thinking_lm.evaluation.draws import Draws, Mixer
from thinking_lm.sharding import fetch, on_mesh_of
from thinking_lm.thoughts.topology import scatter
from thinking_lm.types import Batch, Layout, Params, Report, Thoughts, Trace, Vocabulary

Answer = Callable[[Sequence[tasks.Example]], Sequence[bytes | Sequence[int]]]
"""Examples of a task -> what the model answers to their prompts, as bytes or token ids, in the same order."""


class Subject(Protocol):
  """What is evaluated; an `Experiment` is one."""

  config: Any
  data: Any
  model: Any

  def place(self, params: Params, batch: Batch, thought=None) -> Layout: ...

  def rollout(self, params: Params, batch: Batch, key, given=None, thought=None, layout=None, taps=None) -> Trace: ...


class RowSums(NamedTuple):
  """Sums over the counted targets of each row, float64 [R]; the intervals are over these.

  nats: weighted -log p. count, bytes: weights, and weights times bytes, of the targets. hits, labels: right ones among
  the targets that are asked for (of a task: its labels, or its answer), and all of them. whole: 1 where all are right.
  """

  nats_R: np.ndarray
  count_R: np.ndarray
  bytes_R: np.ndarray
  hits_R: np.ndarray
  labels_R: np.ndarray
  whole_R: np.ndarray


class Arm(NamedTuple):
  """One control, and the reference on the same targets (the model's own thoughts, or the model without any).

  changed: thoughts that were replaced. hits_T, labels_T: right and asked labels by position.
  """

  sums: RowSums
  reference: RowSums
  changed: int
  hits_T: np.ndarray
  labels_T: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
  """What `evaluate` found.

  ids_R: row of the split. arms: control -> Arm, the reference first. draws: K -> Draws. omitted: what was asked for and
  could not be had -> why. calibration: of the reference. generated: task score of each generated answer, or None.
  anchors: how many thoughts there are, and dropped how many found no room. residual: of parallel iterations, as in
  `objective.describe`; None for others. difficulty: of tasks that know their examples'; None for others. seconds: part
  -> (of the first batch, which compiles; of all others).
  """

  split: str
  ids_R: np.ndarray
  arms: Mapping[str, Arm]
  draws: Mapping[int, Draws]
  omitted: Mapping[str, str]
  calibration: Calibration
  generated: np.ndarray | None
  anchors: int
  real_tokens: int
  think_tokens: int
  dropped: int
  residual: float | None
  difficulty: Difficulty | None
  seconds: Mapping[str, tuple[float, float]]

  @property
  def reference(self) -> str:
    """The control that the others are compared with."""
    return next(iter(self.arms))


def controls_of(thought) -> tuple[str, ...]:
  """The controls that say something about a ThoughtConfig, the reference first."""
  if not thought.length:
    return (NONE,)
  return ("own", NONE) if thought.kind == "pause" else ("own", NONE, *(name for name in CONTROLS if name != "own"))


def choose(thought, names: Sequence[str] | None) -> tuple[str, ...]:
  """`names`, each once and after the reference; None: all that say something. Raises ConfigError for a wrong one."""
  possible = controls_of(thought)
  if names is None:
    return possible
  for name in names:
    pick(CONTROLS | {NONE: None}, name, "control")
    if name != NONE and not thought.length:
      raise ConfigError(f"control {name!r} needs thoughts, but thought.length is 0; possible: {NONE}")
  return tuple(dict.fromkeys((possible[0], *names)))


def draws_anything(thought) -> bool:
  """Whether two draws of a thought can differ."""
  greedy = thought.kind_of.policy and thought.temperature == 0
  return bool(thought.length and thought.kind_of.stochastic and not greedy)


class Runner:
  """The jitted functions of one experiment; each is compiled once, as all batches have one shape.

  Thoughts are drawn once (G = 1, whatever thought.samples is in training) and then scored in one parallel pass under
  each control, so that the controls differ in nothing else.
  """

  def __init__(self, subject: Subject):
    self.subject = subject
    self.thought = dataclasses.replace(subject.config.thought, samples=1)
    self._without = dataclasses.replace(self.thought, length=0)
    self.think = jax.jit(self._think)
    self.score = jax.jit(self._score)
    self.without = jax.jit(self._score_without)
    # A loop, for `sharding.rows_of_columns` on many devices cannot be batched.
    self.draw = jax.jit(lambda params, batch, keys_K: jax.lax.map(lambda key: self._draw(params, batch, key), keys_K))
    self.turn = {name: jax.jit(self._turn(function)) for name, function in CONTROLS.items()}

  def first(self, params: Params, batch: Batch) -> tuple[Thoughts, np.ndarray]:
    """(before, before_N) of the first batch: nobody has thought yet."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    trace = jax.eval_shape(lambda *of: self.subject.rollout(*of, thought=self.thought), params, batch, key)
    before = jax.tree.map(lambda a: np.zeros((1, *a.shape[1:]), a.dtype), trace.thoughts)
    return before, np.zeros(trace.valid_BN.shape[1], bool)

  def _think(self, params, batch, key, before, before_N):
    """(Source, (what the next batch has before it, think tokens used after each real token, thoughts, those that had
    no room, sum of residuals)).
    """
    layout = self.subject.place(params, batch, self.thought)
    trace = self.subject.rollout(params, batch, jax.random.fold_in(key, 0), thought=self.thought, layout=layout)
    decoder = self.subject.model.bind(params)
    source = Source(trace.thoughts, trace.valid_BN, decoder.embed_row(decoder.pause), before, before_N)
    dropped = 0 if trace.dropped_B is None else trace.dropped_B.sum()
    residual = 0 if trace.residual_BGN is None else (trace.residual_BGN[:, 0] * trace.valid_BN).sum()
    used_BT = scatter(batch.tokens_BT.shape, 0, layout.anchors_BN, trace.used_BGN[:, 0])
    return source, (latest(source), used_BT, trace.valid_BN.sum(), dropped, residual)

  def _turn(self, control):
    def turn(params, batch, source):
      thoughts, changed_BN = control(source)
      layout = self.subject.place(params, batch, self.thought)
      # Weak types would make `score` compile again for the control that has them.
      thoughts = jax.tree.map(lambda a: jax.lax.convert_element_type(a, a.dtype), thoughts)
      return thoughts, counted(batch, layout, changed_BN, self.thought.topology), changed_BN.sum()

    return turn

  def _score(self, params, batch, key, given):
    return scored(self.subject.rollout(params, batch, key, given=given, thought=self.thought))

  def _score_without(self, params, batch):
    return scored(self.subject.rollout(params, batch, None, thought=self._without))

  def _draw(self, params, batch, key):
    return self.subject.rollout(params, batch, key, thought=self.thought).logp_BGT[:, 0]


class Scored(NamedTuple):
  """What is kept of the trace of one draw: log-probability and hit of each target, of `top_logp_BT` see Trace."""

  logp_BT: jax.Array
  hit_BT: jax.Array
  top_logp_BT: jax.Array
  report: Report | None


def scored(trace: Trace) -> Scored:
  """Of the first sample."""
  return Scored(trace.logp_BGT[:, 0], trace.hit_BGT[:, 0], trace.top_logp_BGT[:, 0], trace.report)


def asked(data, split: str, batch: Batch) -> np.ndarray:
  """asked_BT: bool, the targets that accuracy is about: a task's labels or its answer, else all that have weight."""
  weighed_BT = np.asarray(batch.weights_BT) > 0
  task = data.task
  if task is None or not task.options.weigh_prompt or task.tagging:
    return weighed_BT
  prompts = [task.example(data.options.seed, split, int(i)).prompt for i in np.asarray(batch.ids_B)]
  start_B = np.array([len(task.tokenizer.encode(prompt)) for prompt in prompts])
  return weighed_BT & (np.arange(weighed_BT.shape[1]) >= start_B[:, None])


def row_sums(batch: Batch, vocabulary: Vocabulary, counted_BT, asked_BT, logp_BT, hit_BT) -> RowSums:
  """The sums of each row over its counted targets."""
  weights_BT = np.where(counted_BT, np.asarray(batch.weights_BT, np.float64), 0.0)
  nats_BT = np.where(weights_BT > 0, -np.asarray(logp_BT, np.float64), 0.0)
  bytes_BT = vocabulary.bytes_V[np.asarray(batch.targets_BT)]
  asked_BT = asked_BT & (weights_BT > 0)
  hits_B, labels_B = (asked_BT & hit_BT).sum(axis=1), asked_BT.sum(axis=1)
  sums = ((nats_BT * weights_BT).sum(axis=1), weights_BT.sum(axis=1), (bytes_BT * weights_BT).sum(axis=1))
  return RowSums(*(np.asarray(a, np.float64) for a in (*sums, hits_B, labels_B, (hits_B == labels_B) & (labels_B > 0))))


class Collector:
  """Takes batch after batch, keeps sums, and gives the Evaluation."""

  def __init__(self, runner: Runner, split: str, controls: Sequence[str], samples: Sequence[int]):
    self._runner, self._data, self._split, self._controls = runner, runner.subject.data, split, controls
    self._mixer = Mixer(runner.draw, runner.thought.topology == "private", samples)
    self._arms: dict[str, list[Arm]] = {name: [] for name in controls}
    self._draws: dict[int, list[Draws]] = {k: [] for k in self._mixer.samples}
    self._ids: list[np.ndarray] = []
    self._real_B: list[np.ndarray] = []
    self._calibration: list[Calibration] = []
    self._before = None
    task = self._data.task
    self._by_label = bool(task and task.tagging and task.difficulty)
    self._used: list[np.ndarray] = []
    self._right: list[np.ndarray] = []
    self._anchors = self._real = self._dropped = 0
    self._residual = 0.0
    self._seconds: dict[str, list[float]] = {}

  def _timed(self, part: str, function, *arguments):
    start = time.monotonic()
    result = jax.block_until_ready(function(*arguments))
    self._seconds.setdefault(part, []).append(time.monotonic() - start)
    return result

  def add(self, params: Params, host: Batch, batch: Batch, key) -> None:
    """Scores the rows of `batch`, which are those of `host` on the device."""
    self._real_B.append(host.segments_BT[:, 0] > 0)
    self._ids.append(host.ids_B[self._real_B[-1]])
    self._real += int((host.segments_BT > 0).sum())
    source = None
    if self._runner.thought.length:
      before = self._before or self._runner.first(params, batch)
      source, told = self._timed("thinking", self._runner.think, params, batch, key, *before)
      # `before` too is on the host: a later batch then compiles nothing new.
      self._before, used_BT, anchors, dropped, residual = fetch(told)
      used_RT = used_BT[self._real_B[-1]]
      self._used.append(used_RT if self._by_label else used_RT.sum(axis=1, keepdims=True))
      self._dropped += int(dropped)
      self._residual += float(residual)
      self._anchors += int(anchors)
    asked_BT = asked(self._data, self._split, host)
    reference = None
    for name in self._controls:
      found, counted_BT, changed = self._scored(name, params, batch, key, source)
      reference = reference or found
      rest = (host, self._data.vocabulary, counted_BT, asked_BT)
      self._arms[name].append(_arm(rest, found, reference, changed))
    if self._by_label:
      self._right.append(np.where(asked_BT, reference.hit_BT, np.nan)[self._real_B[-1]])
    self._calibration.append(calibrate(reference.top_logp_BT, reference.hit_BT, asked_BT, reference.report))
    if self._mixer.samples:
      drawn = self._timed("draws", self._mixer, params, batch, key, host.weights_BT)
      real_B = host.segments_BT[:, 0] > 0
      for k, rows in drawn.items():
        self._draws[k].append(Draws(*(a[real_B] for a in rows)))

  def _scored(self, name, params, batch, key, source):
    """(Scored, counted_BT, changed) on the host, under one control."""
    if name == NONE:
      found = self._timed(name, self._runner.without, params, batch)
      return fetch(found), np.ones(batch.tokens_BT.shape, bool), 0

    def run():
      given, counted_BT, changed = self._runner.turn[name](params, batch, source)
      return self._runner.score(params, batch, key, given), counted_BT, changed

    return fetch(self._timed(name, run))

  def result(self, generated: np.ndarray | None) -> Evaluation:
    """Everything that was added."""
    arms, omitted = {}, {}
    for name, parts in self._arms.items():
      arm = _joined(parts)
      if name not in (NONE, self._controls[0]) and not arm.changed:
        omitted[name] = "no thought has a donor" if self._anchors else "there are no thoughts"
      else:
        arms[name] = arm
    if not self._mixer.samples and self._runner.thought.length and not draws_anything(self._runner.thought):
      omitted["draws"] = f"thoughts of kind {self._runner.thought.kind!r} draw nothing: all samples are equal"
    return Evaluation(
      split=self._split,
      ids_R=np.concatenate(self._ids),
      arms=arms,
      draws={k: Draws(*map(np.concatenate, zip(*parts, strict=True))) for k, parts in self._draws.items()},
      omitted=omitted,
      calibration=joined(self._calibration, self._real_B),
      generated=generated,
      anchors=self._anchors,
      real_tokens=self._real,
      think_tokens=int(sum(used_RU.sum() for used_RU in self._used)),
      dropped=self._dropped,
      difficulty=self._difficulty(arms),
      residual=self._residual / max(self._anchors, 1) if self._runner.thought.iterations else None,
      seconds={part: (seconds[0], sum(seconds[1:])) for part, seconds in self._seconds.items()},
    )

  def _difficulty(self, arms) -> Difficulty | None:
    """Of a task that knows how hard its examples are, or their labels, where thoughts can differ in length."""
    task = self._data.task
    if task is None or task.difficulty is None or not self._used or not self._runner.thought.may_end:
      return None
    used_RU, whole_R = np.concatenate(self._used).astype(np.float64), arms[self._controls[0]].sums.whole_R
    levels = [task.difficulty(example) for example in self._data.examples(self._split, len(whole_R))]
    if not self._by_label:
      return Difficulty(np.array(levels, np.float64)[:, None], used_RU, whole_R[:, None])
    right_RU = np.concatenate(self._right)
    level_RU = np.full(right_RU.shape, np.nan)
    level_RU[~np.isnan(right_RU)] = np.concatenate(levels)
    return Difficulty(level_RU, used_RU, right_RU)


def _arm(rest, scored, reference, changed) -> Arm:
  host, _, counted_BT, asked_BT = rest
  real_B = host.segments_BT[:, 0] > 0
  both = (RowSums(*(a[real_B] for a in row_sums(*rest, *each[:2]))) for each in (scored, reference))
  asked_BT = asked_BT & counted_BT & (host.weights_BT > 0)
  return Arm(*both, int(changed), (scored.hit_BT & asked_BT).sum(axis=0), asked_BT.sum(axis=0))


def _joined(parts: Sequence[Arm]) -> Arm:
  join = lambda sums: RowSums(*map(np.concatenate, zip(*sums, strict=True)))
  own, reference, changed, hits_T, labels_T = zip(*parts, strict=True)
  return Arm(join(own), join(reference), sum(changed), sum(hits_T), sum(labels_T))


def evaluate(
  subject: Subject,
  params: Params,
  split: str,
  *,
  key,
  batch_size: int,
  limit: int | None = None,
  controls: Sequence[str] | None = None,
  samples: Sequence[int] = (1, 8, 32),
  put: Callable[[Batch], Batch] = lambda batch: batch,
  answer: Answer | None = None,
  runner: Runner | None = None,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
  """One pass over the first `limit` rows (default all) of a split, on the mesh that the parameters are split over.

  The numbers depend on `key` and the rows, not on `batch_size` (but for rounding); the same call gives the same bits.

  Args:
    controls: names of CONTROLS, or NONE; None: all that say something about the experiment's thoughts.
    samples: the K of the log-mean-exp rows; left out where thoughts are not drawn.
    put: host batch -> device batch. Where there are several processes each has all rows, and finds the same.
    answer: generates answers; the task's verifier scores them. None: no such rows.
    runner: of an earlier call with the same `subject`, which then compiles nothing again.
    progress: called with (rows done, rows in all) after each batch.

  Raises:
    ConfigError: a name that is not known, or a control that the experiment cannot have. DataError: an empty split.
  """
  thought = subject.config.thought
  chosen = choose(thought, controls)
  if any(k < 1 for k in samples):
    raise ConfigError(f"samples must be 1 or more, got {tuple(samples)}")
  if answer is not None and subject.data.task is None:
    raise ConfigError("generated answers are scored by a task's verifier; this data has no task")
  total = min(subject.data.rows(split), limit or subject.data.rows(split))
  collector = Collector(runner or Runner(subject), split, chosen, samples if draws_anything(thought) else ())
  with on_mesh_of(params):
    for host in subject.data.evaluation_batches(split, batch_size=batch_size, limit=limit):
      collector.add(params, host, put(host), key)
      progress(min(int(host.ids_B[-1]) + 1, total), total)
  generated = None
  if answer is not None:
    generated = np.array(list(_scores(subject.data, split, total, batch_size, answer)))
  return collector.result(generated)


def _scores(data, split: str, total: int, batch_size: int, answer: Answer) -> Iterator[float]:
  examples = data.examples(split, total)
  for first in range(0, total, batch_size):
    some = examples[first : first + batch_size]
    yield from (data.task.score(example, given) for example, given in zip(some, answer(some), strict=True))
