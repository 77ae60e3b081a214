"""The bench on numbers that are known, and every suite down to its compiled programs at a small shape."""

import dataclasses
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import quick
from thinking_lm.analysis import (
  bench,
  bench_accelerator,
  bench_checkpoint,
  bench_data,
  bench_decode,
  bench_halting,
  bench_persistent,
  bench_plain,
  bench_private,
  bench_quiet,
  bench_suites,
)
from thinking_lm.analysis import bench_problem as problem
from thinking_lm.analysis.bench import Bar, Case, Result, Variant, measure, over_floor, ratio, record, table
from thinking_lm.model.rollout import rollout
from thinking_lm.objectives.objective import ObjectiveConfig
from thinking_lm.thoughts.placement import place
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Vocabulary

ROOT = pathlib.Path(__file__).parents[2]


def results(**seconds):
  flops = dict(plain=10.0, think=30.0)
  return {name: Result(Variant(name, lambda: None, flops=flops[name]), times) for name, times in seconds.items()}


def test_ratios_are_taken_within_a_round():
  # The machine is twice as slow in the second round; medians over rounds first would give 6 / 2.
  found = results(plain=[1.0, 2.0, 3.0], think=[2.0, 8.0, 6.0])
  assert ratio(found, "think", "plain") == 2.0
  np.testing.assert_allclose(over_floor(found, "think", "plain"), 2 / 3)
  found["think"].variant = found["think"].variant._replace(flops=0.0)
  assert math.isnan(over_floor(found, "think", "plain"))


def test_variants_take_turns_and_are_recorded(monkeypatch):
  ticks = iter(range(1000))
  monkeypatch.setattr(bench, "clock", lambda: float(next(ticks)))
  called, told = [], []
  variants = [
    Variant("host", lambda: called.append("host"), compiled=False),
    Variant("sum", lambda x: (x @ x).sum(), (jnp.ones((8, 8)),), flops=2 * 8**3, tokens=8),
    Variant("other", lambda: called.append("other"), compiled=False),
  ]
  bars = (
    Bar("met", lambda r: ratio(r, "sum", "host"), 1.0),
    Bar("missed", lambda r: r["sum"].tokens_per_second, 9.0, at_most=False),
  )
  case = Case("case", lambda: variants, bars)
  found = measure(case, 2, told.append)
  assert called == ["host", "other"] * 3  # one call to warm up
  assert found["sum"].seconds == [1.0, 1.0] and found["sum"].xla_flops >= 2 * 8**3
  kept = json.loads(json.dumps(record(case, found), allow_nan=False))
  assert kept["bars"]["met"] == dict(value=1.0, bar=1.0, met=True)
  assert kept["bars"]["missed"] == dict(value=8.0, bar=9.0, met=False)
  assert kept["variants"]["sum"]["over_floor"] is None  # the reference's FLOPs are unknown
  shown = table(case, found)
  assert "met: met: 1 (bar <= 1)" in shown and "MISSED: missed: 8 (bar >= 9)" in shown
  assert len(told) == 5
  assert "MFU" not in shown and kept["variants"]["sum"]["mfu"] is None  # nobody knows a CPU's peak
  monkeypatch.setattr(bench.chips, "peak", lambda devices: 4096.0)
  assert record(case, found)["variants"]["sum"]["mfu"] == 0.25 and "MFU 25.0%" in table(case, found)


def test_a_case_that_is_only_compiled():
  case = Case("compile", lambda: [Variant("sum", lambda x: jnp.sin(x).sum(), (jnp.ones(1000),))], timed=False)
  found = measure(case, 3, lambda line: None)
  assert found["sum"].seconds == [] and found["sum"].compile_seconds > 0
  assert json.dumps(record(case, found), allow_nan=False) and "sum" in table(case, found)


def test_what_follows_a_call_is_not_timed(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(bench, "clock", lambda: now[0])
  pass_time = lambda seconds: lambda: now.__setitem__(0, now[0] + seconds)
  variant = Variant("call", pass_time(1.0), compiled=False, after=pass_time(10.0))
  assert measure(Case("case", lambda: [variant]), 2, print)["call"].seconds == [1.0, 1.0]
  assert now == [33.0]


def test_a_profile_is_written(tmp_path):
  case = Case("case", lambda: [Variant("sum", lambda x: (x @ x).sum(), (jnp.ones((8, 8)),))])
  measure(case, 1, lambda line: None, str(tmp_path))
  assert list(tmp_path.rglob("*.xplane.pb"))


def tiny(V=17):
  return problem.model(V, layers=1, width=16, heads=2, mlp_width=24)


def test_checkpoints_and_batches_are_really_made(tmp_path):
  _, save, save_and_end = bench_checkpoint.variants(tiny(), B=2, T=4, directory=str(tmp_path))
  for number, variant in enumerate((save, save_and_end)):
    variant.function()
    variant.after()
    assert (tmp_path / str(number) / "manifest.json").exists()
  step, batch = bench_data.waiting(tiny)
  first, second = batch.function(), batch.function()
  assert first.tokens_BT.size == step.tokens == batch.tokens
  assert not np.array_equal(first.tokens_BT, second.tokens_BT)


def test_the_decode_suite_can_be_traced():
  for variant in [*bench_decode.thoughts(2), *bench_decode.continuations(2), *bench_decode.unused(2)]:
    shape = jax.eval_shape(variant.function, *variant.arguments).shape
    assert math.prod(shape) == (1 if variant.flops and variant.name == "plain" else variant.tokens)


def test_the_decoder_by_hand_is_ours():
  model = problem.model(17, layers=2, width=16, heads=2, mlp_width=24)
  params, batch = problem.params(model), problem.batch(2, 5, 17)
  for unroll in (False, True):
    written, ours = problem.written(model, unroll=unroll), problem.plain(model)
    values = [jax.jit(total)(params, batch)[0] for total in (written, ours)]
    np.testing.assert_allclose(*values, rtol=1e-5)
    gradients = [jax.jit(problem.gradient(total))(params, batch) for total in (written, ours)]
    pairs = zip(*map(jax.tree.leaves, gradients), strict=True)
    for left, right in pairs:
      np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-4 * np.abs(right).max())


def test_the_stand_in_for_quiet_star_thinks_as_we_do():
  model = problem.model(17, layers=2, width=16, heads=2, mlp_width=24)
  params, batch = problem.params(model), problem.batch(2, 5, 17)
  thought = dataclasses.replace(bench_private.thought(3), temperature=0.0, rotary="advance")
  greedy = bench_quiet.stand_in(model, 3, draw=lambda key, logits: jnp.argmax(logits, axis=-1))
  theirs = jax.jit(greedy)(params, batch)[1]
  layout = place(batch, thought, Vocabulary(17, 0, np.ones(17, np.int32), np.zeros(17, np.int8)), aligned=0)
  trace = jax.jit(lambda params: rollout(model, thought, params, batch, layout, jax.random.key(0)))(params)
  np.testing.assert_allclose(theirs["base"].total, -trace.base_logp_BT.sum(), rtol=1e-5)
  np.testing.assert_allclose(theirs["after"].total, -trace.logp_BGT.sum(), rtol=1e-5)
  assert abs(theirs["after"].total - theirs["base"].total) > 0.01


def test_the_plain_suite_can_be_traced():
  for variant in bench_plain.variants(V=17, B=4, T=8):
    assert jax.eval_shape(variant.function, *variant.arguments) and variant.flops and variant.tokens == 32


def test_the_accelerator_suite_can_be_traced():
  small = dict(layers=1, width=16, heads=2, mlp_width=32)
  for variant in bench_accelerator.variants(V=17, T=128, B=1, **small):
    assert jax.eval_shape(variant.function, *variant.arguments) and variant.flops and variant.tokens == 128
  assert [case.name for case in bench_accelerator.cases()] == ["bf16_D1024_V32000_T1024_B8"]


def test_thoughts_of_no_tokens_cost_nothing():
  # The head's control rows and the masks of documents are all that a decoder by hand does without.
  by_hand, nothing = (
    jax.jit(variant.function).lower(*variant.arguments).compile().cost_analysis()["flops"]
    for variant in bench_plain.nothing(V=256, B=2, T=64)
  )
  np.testing.assert_allclose(nothing, by_hand, rtol=0.01)


def test_the_halting_suite_can_be_traced_and_its_lengths_are_those_of_the_loop():
  for variant in bench_halting.variants(2):
    assert jax.eval_shape(variant.function, *variant.arguments).shape == (2, bench_halting.TOKENS)
  random = np.random.default_rng(0)
  ends = np.minimum(random.geometric(0.2, size=(5_000, 3, bench_halting.TOKENS)) - 1, bench_halting.n)
  turns = ends.sum(axis=2).max(axis=1).mean() / bench_halting.TOKENS
  np.testing.assert_allclose(bench_halting.lengths(0.2, 3), (ends.mean(), turns), rtol=0.03)


def test_no_row_of_the_halting_suite_ends_early(monkeypatch):
  monkeypatch.setattr(bench_halting, "V", 3)  # one token of three would be the border
  variant = bench_halting.variants(2)[-1]  # without any thought
  tokens_BX = np.asarray(jax.jit(variant.function)(*variant.arguments))
  assert (tokens_BX[:, -8:] != tokens_BX[:, -1:]).any(axis=1).all(), "behind its end a row repeats the border"


def test_what_has_become_of_a_case_is_told():
  def kept(mib, **seconds):
    variants = {name: dict(seconds=each, temp_bytes=mib * 2**20) for name, each in seconds.items()}
    return dict(reference="plain", variants=variants)

  before = kept(100, plain=[1.0, 2.0, 3.0], think=[2.0, 4.2, 6.0], fast=[3.0, 6.0, 9.0], same=[2.0, 4.4, 6.0])
  now = kept(103, plain=[2.0, 2.0], think=[4.3, 4.4], fast=[5.0, 4.0], same=[4.1, 4.6], new=[1.0, 1.0])
  lines = {line.split(":")[0].strip(): line for line in bench.against(before, now).splitlines()}
  assert "2.000 -> 2.175, SLOWER, 100.0 -> 103.0 MiB, MORE MEMORY" in lines["think"]
  assert "3.000 -> 2.250, faster" in lines["fast"]
  assert "SLOWER" not in lines["same"] and "faster" not in lines["same"], "the rounds overlap"
  assert "was not measured" in lines["new"]
  assert lines["plain"].endswith("plain: 2 -> 2 s, 100.0 -> 103.0 MiB, MORE MEMORY"), (
    "its own ratio is 1 whatever it takes"
  )
  compiled = kept(100, plain=[], think=[])
  assert "SLOWER" not in bench.against(compiled, compiled) and "MORE" not in bench.against(compiled, compiled)


def test_how_far_two_variants_are_apart_is_relative_to_the_other():
  made = {k: Result(Variant(str(k), lambda x, k=k: {"a": k * x, "b": x}, (jnp.ones(4),))) for k in (1, 2)}
  assert bench_persistent.apart(made, 1, 1) == 0
  np.testing.assert_allclose(bench_persistent.apart(made, 2, 1), (4 / 8) ** 0.5, rtol=1e-6)


def temporaries(T, **options):
  """Bytes that a private step needs beside its inputs and outputs, in a row of T tokens."""
  narrow = problem.model(8, layers=1, width=16, heads=2, mlp_width=16, attention_chunk=16, **options)
  thought = ThoughtConfig(kind="sampled", length=2, topology="private", placement="every")
  gradient = problem.gradient(problem.loss(narrow, thought, ObjectiveConfig()))
  compiled = jax.jit(gradient).lower(narrow.shapes, problem.batch(1, T, 8)).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_private_thoughts_grows_with_the_row_and_not_with_its_square():
  assert temporaries(512) < 6 * temporaries(128)
  assert temporaries(512, attention="einsum") > 8 * temporaries(128, attention="einsum")


@pytest.mark.parametrize("suite", sorted(set(bench_suites.SUITES) - {"chip", "accelerator"}))
def test_every_suite_has_an_earlier_result_to_go_against(suite):
  before = json.loads((ROOT / f"configs/bench/{suite}.json").read_text())
  assert before["suite"] == suite and before["code"]["commit"] and before["hardware"]["cpu"]
  assert set(before["cases"]) == {case.name for case in bench_suites.SUITES[suite]()}
  assert all(bench.against(case, case) for case in before["cases"].values())


@pytest.mark.parametrize("flag", ["output", "profile"])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, flag):
  (tmp_path / "file").touch()
  places = dict(output=str(tmp_path / "result.json")) | {flag: str(tmp_path / "file" / "x")}
  code, said, told = quick.command("bench", "--suite=data", *(f"--{name}={place}" for name, place in places.items()))
  assert code == 73 and told.startswith("error: cannot write") and told.count("\n") == 1 and not said
  assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_another_suite_or_an_unknown_one_is_told(tmp_path):
  code, _, told = quick.command("bench", "--suite=fast")
  assert code == 64 and re.search("^error: .*plain.*fast", told)
  (tmp_path / "other.json").write_text("{}")
  kept = json.loads((ROOT / "configs/bench/data.json").read_text())
  (tmp_path / "damaged.json").write_text(json.dumps(kept | dict(cases=dict(bytes_T1024=dict(variants=dict(read=3))))))
  for file, words in (
    (ROOT / "configs/bench/plain.json", "is of suite plain"),
    (tmp_path / "other.json", "is not what"),
    (tmp_path / "damaged.json", "is not what"),
  ):
    code, _, told = quick.command("bench", "--suite=data", f"--against={file}")
    assert code == 64 and words in told and told.count("\n") == 1
