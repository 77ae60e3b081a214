"""The decoder by itself, and the plain decoder as the rollout with thoughts of length 0."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import problem
from tests.model.problem import BATCH, TIED, UNTIED
from tests.slow import leaving
from thinking_lm.config import parse
from thinking_lm.errors import ConfigError
from thinking_lm.model.attention import BACKENDS, MASKED, Backend
from thinking_lm.model.decoder import DTYPES, REMAT, Model, ModelConfig
from thinking_lm.model.rollout import rollout
from thinking_lm.thoughts.placement import place
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.thoughts.tokens import categorical

jit = functools.partial(jax.jit)


def test_the_gradient_of_a_row_that_stands_everywhere_adds_up_in_float32():
  model = problem.model(dataclasses.replace(TIED, compute_dtype="bfloat16"))

  def total(params):
    decoder = model.bind(params)
    return decoder.embed_row(decoder.pause, 3, 1000).sum(dtype=jnp.float32)

  found = jax.grad(total)(problem.params(TIED))["embedding"]
  expected = np.zeros(found.shape)
  expected[model.bind(problem.params(TIED)).pause] = 3000 * TIED.width**0.5  # in bfloat16, ones stop adding up at 256
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("topology", ["persistent", "private"])
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_thoughts_of_length_0_are_the_plain_decoder_bit_for_bit(config, topology):
  model = problem.model(config)
  thought = ThoughtConfig(length=0, topology=topology, placement="every", delimiters=True)

  def thinking(params):
    layout = place(BATCH, thought, problem.VOCABULARY)
    trace = rollout(model, thought, params, BATCH, layout, jax.random.key(0))
    return trace.logp_BGT[:, 0]

  def plain(params):
    decoder = model.bind(params)
    segments = BATCH.segments_BT
    mask = (segments[:, :, None] == segments[:, None, :]) & np.tril(np.ones((problem.T, problem.T), bool))
    mask &= segments[:, None, :] > 0
    hidden, _ = decoder(decoder.embed(BATCH.tokens_BT)[:, None], BATCH.positions_BT[:, None], mask[:, None])
    return categorical(decoder.logits(hidden[:, 0]), BATCH.targets_BT)[0]

  params = problem.params(config)
  real = BATCH.segments_BT > 0
  np.testing.assert_array_equal(jit(thinking)(params)[real], jit(plain)(params)[real])


@pytest.mark.parametrize("topology", ["persistent", "private"])
def test_rows_too_short_for_a_thought_are_the_plain_decoder(topology):
  plain, short = ThoughtConfig(length=0), ThoughtConfig(length=2, topology=topology, placement="stride", stride=50)
  traces = [
    jit(functools.partial(rollout, problem.model(), thought))(
      problem.params(), BATCH, place(BATCH, thought, problem.VOCABULARY), jax.random.key(0)
    )
    for thought in (plain, short)
  ]
  np.testing.assert_array_equal(traces[1].logp_BGT, traces[0].logp_BGT)
  assert traces[1].valid_BN.shape == (len(BATCH.ids_B), 0)
  assert (traces[1].base_logp_BT is not None) == (topology == "private")
  if topology == "private":
    np.testing.assert_array_equal(traces[1].base_logp_BT, traces[0].logp_BGT[:, 0])


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_control_rows_are_never_predicted(config):
  model = Model(dataclasses.replace(config, vocabulary_multiple=8), problem.V)
  decoder = model.bind(model.init(jax.random.key(0)))
  assert (decoder.start, decoder.stop, decoder.pause) == (problem.V, problem.V + 1, problem.V + 2)
  logits = decoder.logits(jax.random.normal(jax.random.key(1), (3, 4, 8)) * 50)
  assert logits.shape == (3, 4, 16) and logits.dtype == jnp.float32
  assert (logits[..., problem.V :] == MASKED).all() and (logits[..., : problem.V] > MASKED / 2).all()
  np.testing.assert_array_equal(jax.nn.softmax(logits)[..., problem.V :], 0)
  if config.logit_cap:
    assert np.abs(logits[..., : problem.V]).max() <= config.logit_cap


def loss_of(config):
  thought = ThoughtConfig(kind="latent", length=1, topology="persistent", placement="stride", stride=4)
  model, layout = problem.model(config), problem.layout([[3]] * len(BATCH.ids_B), block=4).replace(blocks=3)

  def loss(params):
    trace = rollout(model, thought, params, BATCH, layout, jax.random.key(0))
    return jnp.sum(trace.logp_BGT[:, 0] * BATCH.weights_BT), trace

  return loss


@functools.cache
def reference():
  return jit(jax.value_and_grad(loss_of(TIED), has_aux=True))(problem.params())


def test_remat_changes_the_backward_pass_and_not_numbers():
  """Of the plain decoder: serial streams and drawn private thoughts have a backward pass of their own."""
  layout = place(BATCH, ThoughtConfig(length=0), problem.VOCABULARY)

  def run(remat):
    model = problem.model(dataclasses.replace(TIED, remat=remat))
    logp = lambda params: rollout(model, ThoughtConfig(length=0), params, BATCH, layout, jax.random.key(0)).logp_BGT
    loss = jax.value_and_grad(lambda params: jnp.sum(logp(params)[:, 0] * BATCH.weights_BT))
    return jit(loss)(problem.params()), str(jax.make_jaxpr(loss)(problem.params())).count("dot_general")

  (same, expected), products = run("none")
  for remat in (name for name in REMAT if name != "none"):
    (value, gradient), more = run(remat)
    assert more > products
    np.testing.assert_allclose(value, same, rtol=1e-6)
    for leaf, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


THOUGHTS = [ThoughtConfig(length=0), ThoughtConfig(length=2, topology="private")]


@pytest.mark.parametrize("thought", leaving(THOUGHTS, THOUGHTS[:1]))
def test_query_blocks_change_no_numbers(thought):
  layout = place(BATCH, thought, problem.VOCABULARY)

  def total(blocks):
    model = problem.model(dataclasses.replace(UNTIED, query_blocks=blocks))
    loss = lambda params: jnp.sum(
      rollout(model, thought, params, BATCH, layout, jax.random.key(0)).logp_BGT * BATCH.weights_BT[:, None]
    )
    return jit(jax.value_and_grad(loss))(problem.params(UNTIED))

  (one, gradient), (three, other) = total(1), total(3)  # of 8 queries: 3, 3 and 2
  np.testing.assert_allclose(one, three, rtol=1e-6)
  for left, right in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5 * np.abs(right).max())


DRAWN = ThoughtConfig(kind="sampled", length=2, topology="private", lookahead=2, samples=2, delimiters=True)


@pytest.mark.parametrize(
  "backend,thought",
  [("splash_interpret", ThoughtConfig(kind="pause", length=2)), ("splash_interpret", DRAWN), ("chunked", DRAWN)],
)
def test_backends_of_attention_change_no_numbers(monkeypatch, backend, thought):
  calls, made = [], BACKENDS[backend].function
  monkeypatch.setitem(BACKENDS, backend, Backend(lambda *given: calls.append(given) or made(*given)))
  arguments = (problem.params(UNTIED), BATCH, problem.layout(), problem.cotangents(thought))
  other = dataclasses.replace(UNTIED, attention=backend, attention_chunk=3)
  (number, _), gradient = problem.compiled(UNTIED, thought)(*arguments)
  (same, _), found = problem.compiled(other, thought)(*arguments)
  np.testing.assert_allclose(same, number, rtol=1e-5)
  assert problem.relative(found, gradient) < 1e-5 and calls


def saved_bytes(remat):
  """Bytes that the backward pass of one forward pass keeps."""
  model = problem.model(dataclasses.replace(TIED, remat=remat))

  def forward(params):
    decoder = model.bind(params)
    x = decoder.embed(BATCH.tokens_BT)[:, None]
    return decoder(x, BATCH.positions_BT[:, None], jnp.ones((1, 1, problem.T, problem.T), bool))[0].sum()

  kept = jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(forward, params)[1], problem.params()))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)


def test_remat_policies_keep_less_and_less():
  none, dots, full = (saved_bytes(name) for name in ("none", "dots", "full"))
  assert none > dots > full


def test_bfloat16_is_close_and_log_probabilities_are_float32():
  loss = loss_of(dataclasses.replace(TIED, compute_dtype="bfloat16"))
  (_, trace), gradient = jit(jax.value_and_grad(loss, has_aux=True))(problem.params())
  (_, full), expected = reference()
  for name in ("logp_BGT", "outcome_BGN", "policy_logp_BGN", "entropy_BGN"):
    assert getattr(trace, name).dtype == jnp.float32
  assert trace.thoughts.inputs_BGNJD.dtype == DTYPES["bfloat16"]
  real = np.broadcast_to(BATCH.segments_BT[:, None] > 0, trace.logp_BGT.shape)
  error = np.abs(trace.logp_BGT - full.logp_BGT)[real]
  assert 0 < error.max() < 0.15 and error.mean() < 0.03
  for leaf, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
    assert leaf.dtype == jnp.float32
    assert np.linalg.norm(leaf - other) < 0.05 * np.linalg.norm(other)


@pytest.mark.parametrize(
  "values,message",
  [
    (dict(width=10, heads=4), "width 10 does not divide into 4 heads"),
    (dict(heads=4, kv_heads=3), "heads 4 must be a multiple of kv_heads 3"),
    (dict(width=12, heads=4), "a head must have an even width for rotary positions, got 3"),
    (dict(head_width=5), "a head must have an even width for rotary positions, got 5"),
    (dict(layers=0), "config.layers must be at least 1, got 0"),
    (dict(rope_base=1.0), "config.rope_base must be greater than 1, got 1.0"),
    (dict(logit_cap=-1.0), "config.logit_cap must be at least 0, got -1.0"),
    (dict(logit_cap=float("nan")), "config.logit_cap must be finite, got nan"),
    (dict(remat="half"), "unknown name 'half'; known: none, dots, full"),
    (dict(compute_dtype="float16"), "unknown name 'float16'; known: float32, bfloat16"),
    (dict(latent_map="affine"), "unknown name 'affine'; known: identity, linear"),
    (dict(attention="cudnn"), "attention 'cudnn' needs compute_dtype 'bfloat16' and heads of a width that 8 divides"),
    (dict(attention_chunk=0), "config.attention_chunk must be at least 1, got 0"),
    (dict(depth=3), "unknown key config.depth"),
    (dict(layers=2.0), "config.layers must be int, got 2.0 (float)"),
  ],
)
def test_faults_of_a_model_config(values, message):
  with pytest.raises(ConfigError) as caught:
    parse(ModelConfig, values)
  assert [message in line for line in caught.value.faults] == [True]


def test_a_fitting_model_config_has_no_faults():
  assert parse(ModelConfig, dict(width=10, heads=4, head_width=6)).resolved_head_width == 6
