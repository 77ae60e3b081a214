"""The microscope on estimators whose bias and noise are known, and its command on a tiny model."""

import copy
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import quick
from tests.evaluation import harness
from tests.model.problem import relative
from thinking_lm import experiment
from thinking_lm.analysis import estimators, microscope
from thinking_lm.analysis.iterated import iterated
from thinking_lm.analysis.microscope import Estimator
from thinking_lm.analysis.microscope_report import table
from thinking_lm.errors import ConfigError
from thinking_lm.metrics import Mean
from thinking_lm.objectives.advantages import ADVANTAGES
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.training import loop
from thinking_lm.training.state import digest
from thinking_lm.types import Carried

WANTED = dict(embedding=np.full((4, 8), 0.5), layers=dict(query=np.arange(16.0).reshape(4, 4) / 4, up=np.ones(3)))
COUNT = 4.0


def known(bias: float, noise: float, draws=True) -> Estimator:
  """Gradients WANTED + bias in every entry of `query` + noise in every entry of `embedding`."""

  def loss(params, batch, key):
    del batch
    embedding = WANTED["embedding"] + noise * jax.random.normal(key, (4, 8))
    query = WANTED["layers"]["query"] + bias
    layers = params["layers"]
    value = (params["embedding"] * embedding).sum() + (layers["query"] * query).sum() + layers["up"].sum()
    return -COUNT * value, dict(loss=Mean(-COUNT * value, jnp.float32(COUNT)), flat_groups=Mean.of(jnp.ones(2), 0.5))

  return Estimator(loss, flops=2e9, draws=draws)


PARAMS = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), WANTED)
NORM = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(WANTED)))


@pytest.fixture(scope="module")
def reference():
  found = microscope.moments(known(0.0, 0.0, draws=False), PARAMS, None, jax.random.key(0), 999)
  assert found.count == 1
  return microscope.exact(found, "by hand")


def numbers(bias, noise, reference, replicates=400):
  found = microscope.moments(known(bias, noise), PARAMS, None, jax.random.key(1), replicates)
  return found, microscope.compare(found, reference, 2e9)


def test_bias_and_noise_are_found_apart(reference):
  found, parts = numbers(0.3, 2.0, reference)
  assert found.count == 400 and found.told["flat_groups"] == pytest.approx(1.0)
  everything = parts["all"]
  bias, std = 0.3 * 4 / NORM, 2.0 * 32**0.5 / NORM
  assert everything["bias"] == pytest.approx(bias, rel=0.15) and bias < everything["bias_below"] < 2 * bias
  assert everything["std"] == pytest.approx(std, rel=0.05)
  assert everything["error"] == pytest.approx((bias**2 + std**2) ** 0.5, rel=0.05)
  biased = np.ravel(WANTED["layers"]["query"]) + 0.3
  query = np.ravel(WANTED["layers"]["query"])
  assert parts["attention"]["cosine"] == pytest.approx(
    biased @ query / np.linalg.norm(biased) / np.linalg.norm(query), rel=1e-5
  )
  assert parts["attention"]["std"] == parts["mlp"]["std"] == 0 and parts["mlp"]["signal"] is None
  assert parts["embedding"]["bias"] < 0.1 and parts["embedding"]["std"] == pytest.approx(4.0, rel=0.05)
  signal = ((0.5**2 * 32) ** 0.5 / (2 * 32**0.5)) ** 2
  assert parts["embedding"]["signal"] == pytest.approx(signal, rel=0.3)
  assert parts["embedding"]["signal_per_gflop"] == parts["embedding"]["signal"] / 2


def test_noise_alone_is_no_bias(reference):
  _, parts = numbers(0.0, 2.0, reference)
  plain = 2.0 * 32**0.5 / NORM / 400**0.5  # what the mean of 400 estimates is off by
  assert parts["all"]["bias"] < 0.8 * plain
  assert parts["all"]["cosine"] > 0.99


def test_a_cosine_says_how_far_it_is_known():
  """Of estimates that are noise and nothing else it says next to nothing, of ones with little noise a little less."""
  rng, wanted_X = np.random.default_rng(0), np.linspace(1, 2, 64)
  for _ in range(20):
    above = microscope._cosine_above(rng.normal(size=(40, 64)), wanted_X)
    assert above is None or above < 0.3
  few_KX = wanted_X + rng.normal(size=(40, 64))
  cosine, above = microscope._cosine(few_KX, wanted_X), microscope._cosine_above(few_KX, wanted_X)
  assert 0.99 < above < cosine <= 1
  turned_X = np.roll(wanted_X, 20)
  exactly = turned_X @ wanted_X / np.linalg.norm(wanted_X) ** 2
  found = [microscope._cosine_above(turned_X + rng.normal(size=(40, 64)), wanted_X) for _ in range(200)]
  assert np.mean(np.array(found) < exactly) > 0.9


def test_a_reference_that_was_drawn_has_an_error_that_is_no_bias(reference):
  drawn = microscope.averaged(microscope.moments(known(0.0, 2.0), PARAMS, None, jax.random.key(5), 80), "80 draws")
  blur = microscope.describe(dict(J=drawn))["J"]["standard_error"]
  assert blur == pytest.approx(2.0 * 32**0.5 / 80**0.5, rel=0.3)
  exactly = microscope.moments(known(0.0, 0.0, draws=False), PARAMS, None, jax.random.key(0), 1)
  found = microscope.compare(exactly, drawn, 1.0)["all"]
  assert found["bias"] < blur / NORM < found["bias_below"]


def test_parts_are_told_by_the_names_of_parameters():
  from thinking_lm.model.decoder import Model, ModelConfig

  config = ModelConfig(layers=1, width=8, heads=2, qk_norm=True, tie_embeddings=False)
  shapes = Model(config, 5, heads=("value",)).shapes
  parts = {path: microscope.part_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)}
  assert set(parts.values()) == set(microscope.PARTS)
  assert all((path[0].key == "heads") == (part == "heads") for path, part in parts.items())


def test_an_estimator_changes_the_gradient_and_not_the_thought():
  thought = ThoughtConfig(kind="noisy", length=3, placement="stride", stride=4, lookahead=1)
  for name, changes in estimators.ESTIMATORS.items():
    found = estimators.settings(changes, thought, 4)
    assert not {"thought.length", "thought.placement", "thought.stride", "thought.topology"} & set(found), name
    assert name == "own" or found["thought.lookahead"] == 0
    assert name == "own" or found["thought.samples"] == (1 if name == "exact" else 4)
  assert estimators.settings(estimators.ESTIMATORS["own"], thought, 4) == {"train.updates": 1}


def test_every_baseline_has_a_line():
  lines = [changes or {} for changes in estimators.ESTIMATORS.values()]
  assert {changes.get("objective.advantage") for changes in lines} >= ADVANTAGES.keys() - {"leave_one_out"}


def test_rows_are_looked_at_once_however_many_updates_the_run_makes():
  values = harness.config(thought=harness.THOUGHT, objective=dict(score_weight=1.0), train=dict(updates=3))
  thought = experiment.parse(values).thought
  for changes in (*estimators.REFERENCES.values(), *estimators.ESTIMATORS.values()):
    one = copy.deepcopy(values)
    one.update_from_flattened_dict(estimators.settings(changes, thought, 4))
    assert experiment.parse(one).train.updates == 1


def test_a_head_with_a_loss_of_its_own_adds_nothing_to_a_gradient():
  params = dict(norm=jnp.ones(2), heads=dict(value=jnp.ones(3), mix=jnp.ones(3), surrogate=jnp.ones(3)))
  total = lambda heads: lambda params: sum(leaf.sum() for leaf in jax.tree.leaves(estimators.read(params, heads)))
  got = jax.grad(total(["value", "mix"]))(params)
  assert {name: float(leaf.sum()) for name, leaf in got["heads"].items()} == dict(value=0, mix=3, surrogate=0)
  assert got["norm"].sum() == 2 and total(["value", "mix"])(params) == 8 and total([])(params) == 2


def test_the_model_is_split_into_parts_for_every_bound():
  number = dict.fromkeys(microscope.NUMBERS, 1.0)
  one = dict(effective_samples=None, flat_groups=None, against={b: dict(all=number, mlp=number) for b in "MP"})
  reference = dict(how="by hand", norm=1.0, standard_error=0.25)
  found = dict(references=dict.fromkeys("MP", reference), estimators=dict(hybrid=one), refused={}, iterated=None)
  shown = table(found)
  assert "by part of the model, against grad M" in shown and "by part of the model, against grad P" in shown
  assert "|g| 1, standard error 0.25" in shown


@pytest.mark.slow
def test_the_gradient_of_parallel_iterations_is_held_against_the_serial_one():
  """Enough passes have none of a gap, few have one, and it is the one that gradients have."""
  batch = None

  def look(iterations):
    nonlocal batch
    thought = dict(kind="latent", length=1, iterations=iterations)
    subject, params, _ = harness.make(thought=thought, task=dict(length=4))
    batch = batch or jax.tree.map(jnp.asarray, next(subject.data.batches("train", global_batch=2)))
    gradient = jax.grad(lambda params: subject.loss_fn(params, batch, KEY, Carried(step=0))[0])
    return iterated(subject, params, batch, 0, KEY), jax.jit(gradient)(params)

  (none, serial), (few, got), (enough, _) = look(0), look(2), look(5)
  assert none is None
  assert few["against"]["all"]["gap"] == pytest.approx(relative(got, serial), rel=1e-3) and few["residual"] > 1e-2
  assert few["against"]["all"]["gap"] > 1e-2 and few["against"]["all"]["cosine"] < 0.9999
  assert enough["against"]["all"]["gap"] < 1e-4 and enough["residual"] < 1e-5 and enough["flops"] > few["flops"] > 0
  found = dict(references={}, estimators={}, refused={}, iterated=few)
  assert "gradient g of 2 parallel iterations (through the last 2)" in table(found)


def test_thoughts_that_are_not_drawn_are_no_estimate_of_drawn_ones():
  with pytest.raises(ConfigError, match=r"own thoughts \(latent\) are not drawn"):
    estimators.settings(estimators.ESTIMATORS["own"], ThoughtConfig(kind="latent", length=1), 4)


KEY = harness.KEY


command = functools.partial(quick.command, "microscope")


def test_the_command_measures_a_real_decoder(tmp_path):
  flags = [
    "--toy=transformer",
    "--rows=1",
    "--estimates=64",
    "--estimators=hybrid,nll_only,ema,rebar,value",
    "--plot=false",
  ]
  code, out, said = command(*flags, f"--output={tmp_path}")
  assert code == 0, said
  assert "against g = grad M, exact, by enumeration" in out and "left out rebar: " in out and "got length 2" in out
  assert "left out value: these thoughts and this objective need heads that this run has not trained: value" in out
  assert "microscope: 2/3 nll_only" in said
  found = json.loads((tmp_path / "microscope-0.json").read_text())
  against_J = {name: one["against"]["J"]["all"] for name, one in found["estimators"].items()}
  assert set(against_J) == {"hybrid", "nll_only", "ema"} and against_J["hybrid"]["std"] > 0
  assert against_J["nll_only"]["bias"] > 2 * against_J["hybrid"]["bias"]
  assert found["estimators"]["hybrid"]["flops"] > found["estimators"]["nll_only"]["flops"] / 2 > 0
  assert 1 <= found["estimators"]["hybrid"]["effective_samples"] <= 4


PAST = dict(score_weight=1.0, advantage="value", baseline_decay=0.5, kl_weight=0.1)


def test_a_trained_run_with_a_past_and_too_many_thoughts_to_enumerate(tmp_path):
  """Its running mean, its value head and its reference are those of the checkpoint; what is drawn tells its error."""
  values = harness.config(thought=harness.THOUGHT | dict(length=5), objective=PAST)
  built = experiment.build(experiment.parse(values))
  last = loop.train(built.run(), str(tmp_path))
  assert digest(experiment.carried(str(tmp_path), built, 2)) == digest(last.extra)
  flags = ["--rows=1", "--samples=2", "--estimates=16", "--reference_samples=3", "--bounds=J"]
  code, out, said = command(f"--workdir={tmp_path}", *flags, "--estimators=own,ema")
  assert code == 0, said
  file = tmp_path / "microscope" / "microscope-2.json"
  assert f"written: {file}" in out and file.with_suffix(".png").stat().st_size > 1000
  found = json.loads(file.read_text())
  reference = found["references"]["J"]
  assert reference["how"].startswith("mean of 16 estimates with G = 3 (exact sums over every thought, at most 4096")
  assert 0 < reference["standard_error"] < 10 * reference["norm"]
  line = next(line for line in out.splitlines() if line.startswith("against g = grad J"))
  assert line.endswith(f"standard error {reference['standard_error']:.3g}")
  against = {name: one["against"]["J"] for name, one in found["estimators"].items()}
  assert set(against) == {"own", "ema"}
  assert against["ema"]["all"]["std"] < against["own"]["all"]["std"] / 2  # whose value head is as good as untaught


def test_what_is_wrong_is_said_in_one_line():
  code, _, said = command("--toy=transformer", "--workdir=x")
  assert code == 64 and "one of --workdir=DIR, --config=FILE and --toy=NAME is needed" in said
