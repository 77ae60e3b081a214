"""The plan on eight virtual CPU devices: the same functions as for a pod, which need libtpu only for its compiler."""

import dataclasses
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.slow import leaving
from thinking_lm import experiment, recipes
from thinking_lm.analysis import ahead, budgets, chips, collectives, fitting, pods
from thinking_lm.errors import ConfigError
from thinking_lm.training import loop
from thinking_lm.training.mesh import make_mesh

ROOT = pathlib.Path(__file__).parents[2]
TINY = {
  "data.source": "arrayrecord",
  "data.input": "nowhere",
  "data.vocabulary_size": 61,
  "data.sequence_length": 16,
  "data.align": 8,
  "model.width": 32,
  "thought.placement": "stride",
  "train.batch_size": 16,
  "optimizer.ema": 0.9,
  "mesh.data": 2,
  "mesh.fsdp": 2,
  "mesh.tensor": 2,
}


def sketch(recipe="latent", **values):
  config = recipes.apply(experiment.default_config(), recipe)
  config.update_from_flattened_dict(TINY | values)
  return experiment.sketch(experiment.parse(config))


DECODE = pods.Decode(0, 8, 4)


def planned(built, parts=pods.PARTS, known=None):
  return pods.plan(built, chips.CHIPS["v5e"], jax.devices(), 1, parts, DECODE, known)


@pytest.fixture(scope="module")
def plan():
  return planned(sketch())


def test_every_part_compiles_and_bytes_are_those_of_the_shards(plan):
  assert set(plan.parts) == set(pods.PARTS) and all(part.fits for part in plan.parts.values())
  built = sketch()
  mesh = make_mesh(built.config.mesh)
  with jax.set_mesh(mesh):
    made = loop.program(built.run(mesh), mesh)
    state = jax.jit(made.init, out_shardings=made.shardings)(jax.random.key(0))
  own = lambda tree: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
  train = plan.parts["train"].arguments
  assert train["parameters"] == train["ema"] == own(state.params)
  assert train["optimizer"] == own(state.opt_state)
  assert plan.parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))
  assert train["batch"] == 4 * (5 * 4 * 16 + 4), "five arrays of a quarter of the rows, and their ids"


def test_the_plan_is_shown_and_kept(plan):
  text = pods.show(plan, "v5e")
  for word in (
    "train: fits",
    "generate: fits",
    "evaluate: fits",
    "all-reduce",
    "GiB that it moves",
    "MFU at best",
    "assumed:",
  ):
    assert word in text
  found = budgets.record(plan)
  kept = budgets.budget(found)
  assert budgets.faults(kept, found) == []
  kept["train"]["peak_gib"] = -1.0
  kept["generate"]["collectives"].popitem()
  assert len(budgets.faults(kept, found)) == 2


def test_what_has_not_changed_is_not_compiled_again(plan, monkeypatch):
  """The program, the devices and the compiler's options make a fingerprint, and no other run of Python does."""
  known = {name: part.fingerprint for name, part in plan.parts.items()}
  assert len(set(known.values())) == 3
  again = planned(sketch(), known=known)
  assert again.unchanged == pods.PARTS and not again.parts and again.estimate is None
  found, kept = budgets.record(again), budgets.budget(budgets.record(plan))
  assert budgets.faults(kept, found) == [] and budgets.brief(found).startswith("unchanged since it was compiled: train")
  assert budgets.faults(kept | dict(train=kept["train"] | dict(peak_gib=1e3)), found) == [
    "train does not fit: 1000.0 GiB"
  ]
  assert budgets.known(dict(budget=kept), again=False) == known
  assert budgets.known(dict(budget=kept), again=True) == {} == budgets.known(dict(topology="v5e:2x2"), again=False)
  other = sketch(**{"optimizer.b1": 0.8})
  monkeypatch.setattr(ahead, "LEVELS", ("O1",))
  changed = planned(other, known=known)
  assert changed.unchanged == ("generate", "evaluate") and "unchanged" in budgets.brief(budgets.record(changed))
  marks = set()
  for flags in ("", "--xla_something"):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", flags)
    mesh = make_mesh(other.config.mesh)
    with jax.set_mesh(mesh):
      marks.add(ahead.fingerprint(ahead.evaluate(other, mesh).lower(), mesh))
  assert len(marks) == 2 and known["evaluate"] in marks


def test_more_work_is_a_slower_step(plan):
  e = plan.estimate
  assert e.fast == max(e[:4]) and e.slow == pytest.approx(sum(e[:4]))
  assert 0 < e.mfu_real < e.mfu_thinking < 1


def test_rows_that_the_mesh_does_not_divide_are_told_before_compiling():
  with pytest.raises(ConfigError, match=r"train.batch_size 12 is not a multiple"):
    planned(sketch(**{"train.batch_size": 12, "train.accumulation": 2}), ["train"])


def refusal(needed):
  return jax.errors.JaxRuntimeError(
    f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries ({needed}G) exceeds "
    "available HBM (15.75G)."
  )


class Lowered:
  """A program that needs some GiB at O1, and a part of it at the default level."""

  levels = []  # noqa: RUF012

  def __init__(self, gib, saved):
    self.gib, self.saved = gib, saved

  def as_text(self):
    return ""

  def compile(self):
    Lowered.levels.append(jax.config.jax_optimization_level)
    needed = self.gib - self.saved * (Lowered.levels[-1] != "O1")
    if needed > 15.75:
      raise refusal(needed)
    return jax.jit(lambda x: x + 1).lower(jnp.zeros(3)).compile()


def test_what_does_not_fit_quickly_is_compiled_well():
  mesh = make_mesh(sketch().config.mesh)
  before = jax.config.jax_optimization_level
  tight = ahead.compiled(ahead.Part(lambda: Lowered(17.5, 2), {}), mesh, 2**34)
  assert tight.fits and tight.level == "default"
  never = ahead.compiled(ahead.Part(lambda: Lowered(20.0, 2), {}), mesh, 2**34)
  assert not never.fits and never.peak == 18 * 2**30
  assert jax.config.jax_optimization_level == before
  assert Lowered.levels[-2:] == ["O1", before]
  needs_more = ahead.compiled(ahead.Part(lambda: Lowered(1.0, 0), {}), mesh, 1)
  assert not needs_more.fits, "a compiler that does not refuse is held to the same limit"


def test_the_search_says_what_fits_and_changes_the_batch_last():
  config = sketch(**{"train.batch_size": 32, "thought.kind": "pause"}).config
  tried = list(fitting.alternatives(config, DECODE, 8))
  said = [words for words, *_ in tried]
  assert said[:4] == [
    "model.remat=full",
    "model.remat=full train.accumulation=2",
    "model.remat=full train.accumulation=4",
    "model.remat=full train.accumulation=8",
  ]
  assert said[4] == "model.remat=full mesh.data=1 mesh.fsdp=4"
  assert said[5] == "model.remat=full mesh.fsdp=1 mesh.tensor=4 train.accumulation=16"
  assert said[6].endswith("train.batch_size=16") and said[-1].endswith("train.batch_size=4")
  for _, other, _ in tried:
    assert other.model == dataclasses.replace(config.model, remat="full")
  for options in ({}, {"thought.kind": "sampled", "thought.topology": "private"}):
    words = [words for words, *_ in fitting.alternatives(sketch(**options).config, DECODE, 8)]
    assert words and "remat" not in " ".join(words), "it changes nothing of a backward pass of our own"
  several = sketch("hybrid", **{"thought.topology": "private", "thought.lookahead": 2, "train.updates": 2}).config
  assert next(fitting.alternatives(several, DECODE, 8))[0] == "model.remat=full", (
    "thoughts of several updates are scored at once"
  )


def test_advice_is_one_line_and_names_a_config_that_fits(plan, monkeypatch):
  train = dataclasses.replace(plan.parts["train"], fits=False, peak=20 * 2**30)
  evaluate = dataclasses.replace(plan.parts["evaluate"], fits=False, peak=2**34)
  tight = dataclasses.replace(plan, parts=dict(train=train, evaluate=evaluate))
  advice = lambda search: fitting.advice(tight, search, experiment.sketch, jax.devices(), DECODE)
  lacks = "train needs 20.0 GiB, evaluate needs 16.0 GiB of 15.75 GiB a device; "
  assert advice(False) == lacks + "--fit looks for remat, micro-batches, mesh or rows that fit"
  fits = iter([False, True, True])
  monkeypatch.setattr(ahead, "compiled", lambda *_: dataclasses.replace(train, fits=next(fits), peak=2**30))
  assert advice(True) == (
    f"{lacks}train.accumulation=4 does for training, with 1.0 GiB; "
    "evaluation.batch_size=8 does for evaluation, with 1.0 GiB"
  )
  monkeypatch.setattr(ahead, "compiled", lambda *_: train)
  assert advice(True).count("nothing that was tried does for") == 2


def test_rows_at_once_are_halved_before_the_mesh_changes():
  """As far as the mesh can split them, for both ways to run without a backward pass."""
  config = sketch().config
  assert [words for words, *_ in fitting.fewer_prompts(config, DECODE._replace(rows=16), 8)] == [
    *("--rows=8", "--rows=4"),
    "mesh.fsdp=1 mesh.tensor=4 --rows=4",
  ]
  assert [words for words, *_ in fitting.fewer_prompts(config, DECODE, 8)] == ["mesh.fsdp=1 mesh.tensor=4"]
  found = list(fitting.fewer_rows(config, DECODE, 8))
  assert [words for words, *_ in found] == [
    *("evaluation.batch_size=8", "evaluation.batch_size=4"),
    "mesh.fsdp=1 mesh.tensor=4 evaluation.batch_size=4",
  ]
  for _, other, _ in found:
    assert other.train.batch_size == config.train.batch_size and other.evaluation.batch_size in (8, 4)


PODS = [file for file in sorted((ROOT / "configs/pod").glob("*.py")) if "." not in file.stem]  # not the small one


@pytest.mark.parametrize("recipe", ["none", "latent", "hybrid"])
@pytest.mark.parametrize("file", PODS, ids=lambda file: file.stem)
def test_pod_configs_build_without_their_data(file, recipe):
  module = runpy.run_path(str(file))
  config = experiment.parse(module["get_config"](recipe))
  built = experiment.sketch(config)
  batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), experiment_batch(built))
  params, key = built.model.shapes, jax.eval_shape(lambda: jax.random.key(0))
  trace = jax.eval_shape(built.rollout, params, batch, key)
  assert trace.logp_BGT.shape[0] == 2
  thought = config.thought
  expected = dict(none=(0, 1), latent=(4, 1), hybrid=(16, 4))[recipe]
  assert (thought.length, thought.samples) == expected
  assert recipe != "hybrid" or thought.topology == "private"
  size = float(file.stem.split("_")[1].removesuffix("b"))
  count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)) / 1e9
  assert 0.95 * size < count < 1.35 * size


def experiment_batch(built):
  from thinking_lm.training.mesh import MeshConfig, abstract_batch

  return abstract_batch(make_mesh(MeshConfig(data=1, fsdp=-1)), 2, built.data.sequence_length)


def test_weights_travel_and_activations_stay():
  """Under fsdp alone, parameters are gathered, forward and backward, and the few numbers of the rows."""
  built = sketch("none", **{"mesh.data": 1, "mesh.fsdp": 8, "mesh.tensor": 1, "data.sequence_length": 256})
  plan = planned(built, ["train"])
  activations = 4 * 16 * 256 * 32  # of one layer's input, all rows
  gathered = plan.parts["train"].collectives["all-gather"].bytes
  assert gathered < 4 * 4 * plan.parameters
  assert gathered < activations, "or the bound above says nothing"


def test_the_slots_of_a_private_thought_share_gathered_weights():
  options = {"mesh.data": 1, "mesh.fsdp": 8, "mesh.tensor": 1, "thought.topology": "private", "thought.lookahead": 2}
  plan = planned(sketch("hybrid", **options | {"thought.length": 16, "thought.stride": 8}), ["train"])
  gathered = plan.parts["train"].collectives["all-gather"].bytes
  assert gathered < 10 * 4 * plan.parameters, "not once for each of 17 slots"


def test_decoding_gathers_its_weights_once(monkeypatch):
  """And not in every turn of its loop, which goes on until something happens."""
  built, trips = sketch("none", **{"mesh.data": 1, "mesh.fsdp": 8, "mesh.tensor": 1}), collectives._trips
  monkeypatch.setattr(collectives, "_trips", lambda *given: trips(*given) or 1_000)
  gathered = planned(built, ["generate"]).parts["generate"].collectives["all-gather"].bytes
  assert gathered < 10 * 4 * built.model.size


PRIVATE = {"thought.topology": "private", "thought.lookahead": 2, "thought.length": 4, "thought.stride": 8}


def between_slices(recipe, **values):
  """(Collectives between two groups of four devices that `data` joins, bytes of the gradients of a device)."""
  built = sketch(recipe, **(PRIVATE if recipe == "hybrid" else {}) | values)
  plan = pods.plan(built, chips.CHIPS["v5e"], jax.devices(), 2, ["train"], pods.Decode(0, 8, 4))
  assert plan.estimate.slices > 0
  part = plan.parts["train"]
  crossing = {kind: each for kind, each in part.collectives.items() if kind.endswith(collectives.SLICES)}
  return crossing, part.arguments["parameters"]


@pytest.mark.parametrize("accumulation", leaving([1, 2], [1]))
@pytest.mark.parametrize("recipe", leaving(["none", "latent", "hybrid"], ["latent"]))
def test_between_slices_only_the_sum_of_gradients_travels(recipe, accumulation):
  """Each device sends what it holds of the gradients once, and some metrics."""
  split = {"mesh.fsdp": 4, "mesh.tensor": 1} if recipe == "hybrid" else {"mesh.fsdp": 1, "mesh.tensor": 4}
  crossing, gradients = between_slices(recipe, **split, **{"train.accumulation": accumulation})
  assert list(crossing) == ["all-reduce between slices"]
  sums, metrics = crossing["all-reduce between slices"], 200
  assert sums.runs == 1 and gradients < sums.bytes < gradients + metrics


@pytest.mark.parametrize("recipe", ["none", "latent", "hybrid"])
def test_between_slices_that_two_axes_split_only_gradients_travel(recipe):
  """A parameter's gradient is summed once for each of its uses there, see `sharding.each_copy`."""
  crossing, gradients = between_slices(recipe)
  uses = 3 if recipe == "hybrid" else 2
  assert list(crossing) == ["all-reduce between slices"]
  assert gradients < crossing["all-reduce between slices"].bytes < uses * gradients + 2000
