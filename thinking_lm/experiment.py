"""The one place that wires data, thoughts, model and objective together.

A ConfigDict comes in and stops here: `parse` makes the frozen sections out of it (or lists every fault), `build` makes
the parts. Nothing below this file sees a ConfigDict, and nothing above it needs to know how a loss is put together.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from thinking_lm import config as config_lib
from thinking_lm import rules
from thinking_lm.beside import passes
from thinking_lm.config import option
from thinking_lm.data import pipeline
from thinking_lm.data.rows import assemble
from thinking_lm.errors import ConfigError, DataError
from thinking_lm.evaluation.health import Examination
from thinking_lm.evaluation.hook import EvaluationConfig, hooks
from thinking_lm.metrics import Mean
from thinking_lm.model.decoder import Model, ModelConfig
from thinking_lm.model.enumeration import rollout_every
from thinking_lm.model.generate import Generation, Sampling, generate
from thinking_lm.model.need import needed
from thinking_lm.model.rollout import actions, rollout
from thinking_lm.objectives import carry
from thinking_lm.objectives.exact import marginal
from thinking_lm.objectives.health import HealthConfig, History, signs
from thinking_lm.objectives.health import rules as health_rules
from thinking_lm.objectives.objective import ObjectiveConfig, estimating, objective, volume
from thinking_lm.sharding import fetch, on_mesh_of
from thinking_lm.thoughts.answer import answered
from thinking_lm.thoughts.placement import place
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.training.alarms import Watch
from thinking_lm.training.checkpoint import CheckpointConfig, read_manifest, read_params
from thinking_lm.training.checkpoint import load as read_step
from thinking_lm.training.loop import Run, TrainConfig
from thinking_lm.training.mesh import MeshConfig, device_faults, everywhere, feed, global_batch, make_mesh, placed
from thinking_lm.training.optimizer import OptimizerConfig, schedule_faults
from thinking_lm.training.state import TrainState, create
from thinking_lm.training.state import key as random_key
from thinking_lm.training.state import shardings as state_shardings
from thinking_lm.training.warm import first_params
from thinking_lm.training.workdir import resolve
from thinking_lm.types import Batch, Beside, Carried, Layout, Params, Thoughts, Trace


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """Everything a run depends on, section by section."""

  data: pipeline.DataConfig = option(pipeline.DataConfig(), "rows")  # noqa: RUF009 (all sections are frozen)
  model: ModelConfig = option(ModelConfig(), "decoder")  # noqa: RUF009
  thought: ThoughtConfig = option(ThoughtConfig(), "thoughts")  # noqa: RUF009
  objective: ObjectiveConfig = option(ObjectiveConfig(), "objective")  # noqa: RUF009
  optimizer: OptimizerConfig = option(OptimizerConfig(), "optimizer")  # noqa: RUF009
  train: TrainConfig = option(TrainConfig(), "training loop")  # noqa: RUF009
  checkpoint: CheckpointConfig = option(CheckpointConfig(), "checkpoints")  # noqa: RUF009
  evaluation: EvaluationConfig = option(EvaluationConfig(), "evaluation while training")  # noqa: RUF009
  health: HealthConfig = option(HealthConfig(), "alarms about thoughts")  # noqa: RUF009
  mesh: MeshConfig = option(MeshConfig(), "device mesh")  # noqa: RUF009

  def faults(self) -> list[str]:
    """Rules across sections."""
    return (
      schedule_faults(self.optimizer, self.train.steps)
      + rules.objective_faults(self.objective, self.thought)
      + rules.update_faults(self.train.updates, self.objective)
      + rules.estimator_faults(self.objective, self.thought)
      + rules.answer_faults(self.thought, self.data)
      + rules.reward_faults(self.objective, self.thought, self.data)
      + rules.label_faults(self.thought, self.data)
      + rules.mesh_faults(self.mesh.sequence, self.thought)
      + rules.room_faults(self.thought, self.data.sequence_length, self.data.aligned)
    )


def default_config() -> ml_collections.ConfigDict:
  """The default of every option, for a config file to change."""
  return config_lib.to_config_dict(ExperimentConfig())


def parse(values: Mapping[str, Any], here: bool = False) -> ExperimentConfig:
  """The config as frozen sections. Raises ConfigError with every fault at once; allocates nothing.

  Args:
    here: also demand that the mesh fits the devices of this job and divides the batch, and that they run the model.
  """
  faults, config = [], None
  try:
    config = config_lib.parse(ExperimentConfig, values)
  except ConfigError as error:
    faults += error.faults
  if here:
    try:
      sections = ((MeshConfig, "mesh"), (TrainConfig, "train"))
      mesh, train = (config_lib.parse(cls, values.get(name, {})) for cls, name in sections)
      faults += config.model.backend_faults(jax.default_backend()) if config else []
      faults += device_faults(mesh, train.batch_size, train.accumulation, jax.device_count())
    except (ConfigError, TypeError):
      assert faults, "these sections' faults are in the list already"
  if faults:
    raise ConfigError(faults)
  return config


OPTIONAL = ("heads/",)
"""Names of parameters that those of another run may lack, see `warm.start`."""

PROMPT_MULTIPLE = 32
"""Prompts are padded to a multiple of this, so that prompts of about one length share a compilation."""


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
  """The parts of a run, as plain objects and pure functions.

  init: key -> params. axes: logical axis names of every parameter. place: (params, batch) -> Layout.
  proxy: the frozen model whose need a placement goes by, and its parameters; None: the model itself.
  """

  config: ExperimentConfig
  data: pipeline.Data
  model: Model
  proxy: tuple[Model, Params] | None = None

  @property
  def init(self) -> Callable[[jax.Array], Params]:
    """Fresh parameters from a key."""
    return self.model.init

  @property
  def axes(self) -> Any:
    """Logical axis names, a dict like the parameters."""
    return self.model.axes

  def place(self, params: Params, batch: Batch, thought: ThoughtConfig | None = None) -> Layout:
    """Where a batch is thought about; `thought` in place of the config's, for an evaluation."""
    thought = thought or self.config.thought
    if thought.by_need:
      batch = needed(*(self.proxy or (self.model, params)), batch)
    return place(batch, thought, self.data.vocabulary, self.data.aligned)

  def rollout(self, params: Params, batch: Batch, key, given=None, thought=None, layout=None, taps=None) -> Trace:
    """Thinks where a Layout or else `place` says, as a ThoughtConfig or else the config says; see `rollout.rollout`."""
    thought = thought or self.config.thought
    layout = layout or self.place(params, batch, thought)
    trace = rollout(self.model, thought, params, batch, layout, key, given, taps)
    return answered(trace, batch, layout, self.data.vocabulary, self.data.task)

  def loss_fn(self, params: Params, batch: Batch, key, carried: Carried) -> tuple[jax.Array, dict[str, Mean]]:
    """The loss of a batch, summed over targets, and its metrics."""
    goal, thought = self.config.objective, self.config.thought.at(carried.step)
    if goal.exact:
      layout = self.place(params, batch, thought)
      trace, beside, told = marginal(rollout_every(self.model, thought, params, batch, layout, key)), Beside(), {}
    else:
      trace, beside = self._think(params, batch, key, carried, thought)
      told = signs(trace, thought)
    loss, metrics = objective(goal, trace, beside, carried.extra, carried.step)
    return loss, metrics | volume(trace, batch, self.data.vocabulary) | told

  def _think(self, params: Params, batch: Batch, key, carried: Carried, thought: ThoughtConfig) -> tuple[Trace, Beside]:
    """The thoughts, drawn here or before the first of several updates, and what stands beside them."""
    if carried.drawn is None:
      layout = self.place(params, batch, thought)
      trace = self.rollout(params, batch, key, thought=thought, layout=layout)
      return trace, passes(self, params, batch, key, carried.extra, layout, trace.thoughts)
    layout, thoughts, beside = carried.drawn
    given = actions(self.model.bind(params), thought, thoughts)
    return self.rollout(params, batch, key, given, thought, layout), beside

  def draw(self, params: Params, batch: Batch, key, carried: Carried) -> tuple[Layout, Thoughts, Beside]:
    """What stays the same in all updates of a step: the thoughts, where they are, and what stands beside them."""
    trace, beside = self._think(params, batch, key, carried, self.config.thought)
    return self.place(params, batch), trace.thoughts, beside.replace(drawn_logp_BGNJ=trace.token_logp_BGNJ)

  def run(self, mesh: Mesh | None = None) -> Run:
    """What `training.loop.train` trains.

    Args:
      mesh: of devices that are not here, for a plan: nothing is hooked on, since hooks look at data. None: the
        config's; raises ConfigError if it does not fit.
    """
    c = self.config
    fed = functools.partial(feed, mesh or make_mesh(c.mesh))
    looks = lambda: hooks(c.evaluation, self, random_key(c.train.seed, "evaluate"), fed) + self._examinations(fed)
    return Run(
      init_fn=self.init,
      axes=self.axes,
      loss_fn=self.loss_fn,
      data=self.data,
      train=c.train,
      checkpoint=c.checkpoint,
      optimizer=c.optimizer,
      mesh=c.mesh,
      resolved_config=config_lib.to_config_dict(c).to_dict(),
      record=dict(tokenizer=self.data.tokenizer.digest),
      hooks=() if mesh else looks(),
      watch=self._watch(),
      carry_init=functools.partial(carry.init, c.objective),
      carry_update=functools.partial(carry.update, c.objective),
      carry_from={"reference": c.objective.kl_reference} if c.objective.kl_reference else {},
      draw_fn=self.draw,
      optional=OPTIONAL,
    )

  def _watch(self) -> Watch | None:
    """The alarms of a run that thinks."""
    c = self.config
    if not c.thought.length:
      return None
    half = c.model.compute_dtype != "float32"
    found = health_rules(c.health, self.data.vocabulary.size, half, c.thought.kind_of.discrete, c.thought.samples)
    return Watch(found, History, c.health.patience)

  def _examinations(self, fed) -> tuple[Examination, ...]:
    """The look at thoughts every so many steps and after the last one."""
    c, goal = self.config, self.config.objective
    if not c.thought.length or not c.health.every:
      return ()
    terms = {}
    if goal.score_weight:
      alone = dict(score=dict(nll_weight=0.0, base_weight=0.0))
      if goal.nll_weight or goal.base_weight:
        alone["nll"] = dict(score_weight=0.0)
      for name, change in alone.items():
        term = self.with_sections(objective=dataclasses.replace(goal, entropy_weight=0.0, kl_weight=0.0, **change))
        terms[name] = lambda params, *rest, loss_fn=term.loss_fn: loss_fn(estimating(params), *rest)
    key = random_key(c.train.seed, "evaluate")
    rows = max(2, c.train.batch_size // c.train.accumulation)  # in memory at once, as in a step; halves need two
    return (Examination(c.health.every, c.evaluation.split, rows, self, key, fed, terms, self._first),)

  def _first(self, params: Params) -> Params | None:
    """The parameters that the run started with, laid out as these; None where they are gone (train.init_from)."""
    layout = jax.tree.map(lambda leaf: leaf.sharding, params)
    try:
      return first_params(self.config.train, self.init, OPTIONAL, layout)
    except (ConfigError, DataError) as error:
      logging.warning("kl_start is not logged: %s", error)
      return None

  def with_sections(self, **sections) -> "Experiment":
    """The same experiment with other config sections, on the same data and model."""
    return dataclasses.replace(self, config=dataclasses.replace(self.config, **sections))

  def with_config(self, config: ExperimentConfig) -> "Experiment":
    """The same data under another config, whose model has the heads that this one asks for and no others."""
    return dataclasses.replace(self, config=config, model=_model(config, self.data))

  def rethought(self, changes: Sequence[str]) -> "Experiment":
    """The same data and parameters with other options of the thought section, each as `name=value`.

    Raises ConfigError: of the options, or because these parameters or rows cannot be thought about so.
    """
    if not changes:
      return self
    thought = config_lib.changed(self.config.thought, "thought", changes)
    faults = rules.rethought_faults(thought, self.config, self.data, self.model)
    if faults:
      raise ConfigError(faults)
    return dataclasses.replace(self.with_sections(thought=thought), proxy=_proxy(thought, self.data))

  def generate(self, params: Params, prompts: Sequence[bytes], key, sampling: Sampling) -> Generation:
    """Continues texts; rows b G ... b G + G - 1 of the result (numpy leaves) belong to prompts[b] (`Sampling.samples`).

    An empty prompt is a fresh document. What is drawn for a prompt depends on `key`, its place in the list and itself.
    """
    border = np.array([self.data.vocabulary.document], np.int32)
    rows = [np.concatenate([border, self.data.tokenizer.encode(prompt)]) for prompt in prompts]
    longest = max(map(len, rows))
    batch = assemble(
      [(row, row, np.zeros(len(row))) for row in rows],
      -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE,
      np.arange(len(rows), dtype=np.uint32),
      self.data.vocabulary,
    )
    with on_mesh_of(params):
      mesh = jax.sharding.get_mesh()
      return fetch(self.decode(sampling)(params, batch if mesh.empty else global_batch(mesh, batch), key=key))

  @functools.lru_cache(maxsize=4)  # noqa: B019 (an experiment lives as long as its process)
  def decode(self, sampling: Sampling):
    """The compiled decoder."""
    return jax.jit(
      functools.partial(
        *(generate, self.model, self.config.thought),
        **dict(vocabulary=self.data.vocabulary, sampling=sampling, watcher=self.proxy),
      )
    )


def build(config: ExperimentConfig, rows: bool = True) -> Experiment:
  """Reads the data and sets up the model; no parameters yet. Paths of data become absolute.

  Args:
    rows: false reads the tokenizer only, for somebody who brings the texts.

  Raises:
    ConfigError, DataError: as of `pipeline.build`.
  """
  config = dataclasses.replace(config, data=pipeline.locate(config.data))
  data = (pipeline.build if rows else pipeline.without_rows)(config.data)
  faults = rules.size_faults(config.objective, config.thought, data) if rows else []
  if faults:
    raise ConfigError(faults)
  return _wired(config, data)


def _wired(config: ExperimentConfig, data: pipeline.Data) -> Experiment:
  return Experiment(config, data, _model(config, data), _proxy(config.thought, data))


def _model(config: ExperimentConfig, data: pipeline.Data) -> Model:
  heads = rules.heads(config.thought, config.objective, config.data)
  return Model(config.model, data.vocabulary.size, heads, config.thought.confidences, data.vocabulary.document)


def _proxy(thought: ThoughtConfig, data: pipeline.Data) -> tuple[Model, Params] | None:
  """The frozen model of thought.proxy. Raises ConfigError if it is not there or reads other tokens."""
  if not thought.proxy:
    return None
  built, params, _ = load(thought.proxy, rows=False)
  if built.data.tokenizer.digest != data.tokenizer.digest:
    raise ConfigError(f"thought.proxy {thought.proxy} was trained with another tokenizer than this run has")
  return built.model, fetch(params) if jax.process_count() > 1 else params  # functions close over them


def sketch(config: ExperimentConfig) -> Experiment:
  """The Experiment of a config without reading its data, to compile what it would run.

  The vocabulary is a stand-in of `data.vocabulary_size` ids, or the tokenizer's own where that is 0; a task, which has
  no files, is built. Raises ConfigError or DataError if the tokenizer is not to be had.
  """
  return _wired(config, pipeline.sketch(config.data))


def load(
  workdir: str, averaged: bool = False, rows: bool = True, places: Mapping[str, str] | None = None
) -> tuple[Experiment, Params, int]:
  """(Experiment, parameters, step) of a trained work directory, for evaluation and generation. Changes nothing there.

  The parameters are split over all devices that there are, whatever mesh the run had.

  Args:
    averaged: the moving average of the parameters, for a run with optimizer.ema.
    rows: as of `build`.
    places: where the data lies now: option of `pipeline.PLACES` -> its value, for those that are not as they were.

  Raises:
    ConfigError: there is no config, or the checkpoint is of another one. DataError: no checkpoint is intact.
  """
  path = resolve(workdir)
  file = path / "config.json"
  if not file.exists():
    raise ConfigError(f"{path} is no work directory: it has no config.json; train into it first")
  try:
    values = json.loads(file.read_text())
  except ValueError as error:
    raise ConfigError(f"{file} is not JSON: {error}") from error
  values["data"] = values.get("data", {}) | {name: place for name, place in (places or {}).items() if place}
  config = parse(values)
  config = dataclasses.replace(config, model=config.model.runnable(jax.default_backend()))
  try:
    built = build(config, rows)
  except ConfigError as error:
    flags = "--data, --validation_data, --test_data or --tokenizer" if rows else "--tokenizer"
    raise ConfigError(f"{error} (the config of {path} says so; {flags} may name another place)") from error
  if averaged and not built.config.optimizer.ema:
    raise ConfigError(f"{path} has no averaged parameters: it was trained with optimizer.ema 0")
  step, params = read_params(path / "checkpoints", _placed(built).params, averaged)
  manifest = read_manifest(path / "checkpoints" / str(step))
  if manifest.get("tokenizer", built.data.tokenizer.digest) != built.data.tokenizer.digest:
    raise ConfigError(f"{path} was trained with another tokenizer than {built.config.data.tokenizer}")
  if rows and manifest["identity"]["data"] != built.data.digest:
    logging.warning("these rows are not those of the run %s: its data says something else now, or is other data", path)
  return built, params, step


def _placed(built: Experiment) -> TrainState:
  """Parameters and what the objective carries, as ShapeDtypeStructs that are split over all devices that there are."""
  carry_init = functools.partial(carry.init, built.config.objective)
  abstract = jax.eval_shape(lambda params: create(params, optax.identity(), False, carry_init), built.model.shapes)
  return placed(abstract, state_shardings(abstract, built.axes, everywhere()))


def carried(workdir: str, built: Experiment, step: int) -> dict[str, Any]:
  """What the objective of a run carried at the step that `load` found; of a run that carries nothing, nothing."""
  wanted = _placed(built).extra
  return read_step(resolve(workdir) / "checkpoints" / str(step), wanted, "extra/") if wanted else {}
