"""The count of bytes: by hand where a hand can, and beside XLA's own on a model whose loops run once."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from thinking_lm import experiment, recipes
from thinking_lm.analysis import traffic
from thinking_lm.analysis.traffic import passes, training_traffic
from thinking_lm.model.decoder import Model, ModelConfig
from thinking_lm.model.rollout import rollout
from thinking_lm.thoughts.placement import place
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Batch, Vocabulary

V, T, B, P = 253, 64, 2, 1_000_000
VOCABULARY = Vocabulary(V, 4, np.ones(V, np.int32), np.zeros(V, np.int8))
MODEL = ModelConfig(layers=1, width=256, heads=4, kv_heads=2)


def config(model=MODEL, thought=None, batch=B, accumulation=1, ema=0.0):
  """What the count reads of an ExperimentConfig."""
  thought = thought or ThoughtConfig(length=0)
  train = types.SimpleNamespace(batch_size=batch, accumulation=accumulation)
  other = dict(data=types.SimpleNamespace(aligned=0), optimizer=types.SimpleNamespace(ema=ema))
  return types.SimpleNamespace(model=model, thought=thought, train=train, **other)


def thinking(**options):
  return ThoughtConfig(**dict(length=1, placement="stride", stride=T) | options)


def test_a_plain_step_by_hand():
  """One layer of width 256, MLP width 704, 4 heads of 64 and 2 of keys; 256 rows of the table; float32."""
  found = training_traffic(config(), V, T, P)
  table = 256 * 256
  assert found.weights == 4 * (2 * (P - table) + 3 * table), "forward and backward; the head is computed again"
  assert found.activations == 4 * 3 * B * T * (6 * 256 + 4 * 64 * (4 + 2) + 3 * 704)
  assert found.scores == (16 + 20) * B * 4 * T * T
  assert found.logits == 36 * B * T * 256 and found.cache == 0
  assert found.state == 4 * 8 * P
  assert found.total == sum(dataclasses.asdict(found).values())


def test_remat_bfloat16_accumulation_and_averages_by_hand():
  plain = training_traffic(config(), V, T, P)
  full = training_traffic(config(dataclasses.replace(MODEL, remat="full")), V, T, P)
  assert full.activations == plain.activations / 3 * 4 and full.scores == plain.scores / 36 * 52
  assert training_traffic(config(dataclasses.replace(MODEL, attention="splash")), V, T, P).scores == 0
  half = training_traffic(config(dataclasses.replace(MODEL, compute_dtype="bfloat16")), V, T, P)
  assert half.activations == plain.activations / 2 and half.state == plain.state + 6 * P, "a copy is made of each"
  four = training_traffic(config(accumulation=4, ema=0.9), V, T, P)
  assert four.weights == 4 * plain.weights and four.activations == plain.activations
  assert four.state == 4 * (7 + 3 * 4 + 2) * P


def test_a_mesh_divides_rows_by_all_but_tensor_and_state_by_all_but_data():
  whole = training_traffic(config(batch=8), V, T, P)
  part = training_traffic(config(batch=8), V, T, P, dict(data=2, fsdp=4, tensor=2, sequence=1))
  assert part.activations == whole.activations / 16 and part.scores == whole.scores / 16
  assert part.weights == whole.weights / 2 and part.state == whole.state / 8


def test_serial_thoughts_call_the_layers_again_and_read_the_cache():
  private = passes(MODEL, thinking(kind="sampled", topology="private", length=3, samples=2), T, 0)
  J = thinking(kind="sampled", topology="private", length=3).slots
  assert private.forward == 1 + J and private.backward == 1, "scored in one pass"
  assert private.slots == T + 2 * J and private.cached == J * (T + 2 * J)
  persistent = passes(MODEL, thinking(kind="latent", length=3, stride=16), T, 0)
  assert persistent.forward == persistent.backward > 3 * T // 16 and persistent.again
  assert persistent.cached > persistent.forward, "more keys than one in each call"
  pause = passes(MODEL, thinking(kind="pause", length=3, stride=16), T, 0)
  assert (pause.forward, pause.backward, pause.cached) == (1, 1, 0)
  entropy = passes(MODEL, thinking(kind="pause", length=3, stride=16, halting="entropy"), T, 0)
  assert entropy.forward > 3 * T // 16 and entropy.again, "whether it ends is asked of each state"
  iterated = passes(MODEL, thinking(kind="soft", length=3, stride=16, iterations=4, through=2), T, 0)
  assert (iterated.forward, iterated.backward, iterated.work) == (4, 2, 4)


def test_mixed_predictions_and_learned_ends_read_the_head_more_often_by_hand():
  heads = lambda **options: passes(MODEL, thinking(topology="private", stride=16, **options), T, 0).heads
  N, exits = T // 16, 4
  assert heads(kind="latent", length=3) == T + N
  assert heads(kind="latent", length=3, halting="ponder") == T + N * (1 + exits)
  assert heads(kind="latent", length=3, halting="ponder", mixing="logit") == T + N * 2 * (1 + exits)
  assert heads(kind="sampled", length=3, samples=2, mixing="probability") == T + 2 * N * (3 + 2)


@pytest.mark.parametrize("options", [dict(length=0), dict(kind="latent"), dict(kind="sampled", topology="private")])
def test_beside_what_xla_says(options):
  """XLA's CPU compiler fuses no elementwise work into products, and transposes heads: 1.4 to 3.4 times as many."""
  thought = thinking(**options)
  model = Model(MODEL, V)
  tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
  weights, ids = jax.ShapeDtypeStruct((B, T), jnp.float32), jax.ShapeDtypeStruct((B,), jnp.uint32)
  batch = Batch(tokens, tokens, weights, tokens, tokens, ids)

  def total(params, batch):
    trace = rollout(model, thought, params, batch, place(batch, thought, VOCABULARY, aligned=0), jax.random.key(0))
    return trace.logp_BGT.sum() + trace.policy_logp_BGN.sum()

  xla = jax.jit(jax.grad(total)).lower(model.shapes, batch).compile().cost_analysis()["bytes accessed"]
  parameters = sum(leaf.size for leaf in jax.tree.leaves(model.shapes))
  found = training_traffic(config(thought=thought), V, T, parameters)
  ours = found.total - found.state + 4 * parameters  # the gradient is written, and there is no optimizer
  assert 1.4 < xla / ours < 3.4


def test_utilisation_with_thinking_and_of_real_tokens_alone():
  config = recipes.apply(experiment.default_config(), "latent")
  config.thought.placement = "stride"
  config = experiment.parse(config)
  work = traffic.work(config, V, T, P, peak=100.0)
  plain = traffic.work(dataclasses.replace(config, thought=ThoughtConfig(length=0)), V, T, P, peak=100.0)
  assert work.plain == plain.needed == plain.plain < work.needed
  rates = work.rates(0.5)
  assert rates["moved_bytes_per_second"] == work.moved / 2 > plain.moved / 2
  assert rates["flops_per_byte"] == work.needed / work.moved
  assert rates["needed_flops_per_second"] == work.needed / 2
  np.testing.assert_allclose(rates["mfu_thinking"] / rates["mfu_real"], work.needed / work.plain)
  assert "mfu_real" not in work._replace(peak=0.0).rates(0.5)
