"""What the suites measure on: the tiny decoder, random rows, our loss, and the same decoder written by hand.

The decoder written by hand is no code of the package: what the package's generality costs is measured against it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from thinking_lm.analysis.flops import ledger
from thinking_lm.analysis.traffic import gradient_traffic
from thinking_lm.metrics import Mean
from thinking_lm.model.decoder import Model, ModelConfig
from thinking_lm.model.rollout import rollout
from thinking_lm.objectives.objective import ObjectiveConfig, objective
from thinking_lm.thoughts.placement import place
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.training import state as state_lib
from thinking_lm.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from thinking_lm.training.step import StepConfig, make_train_step
from thinking_lm.types import Batch, Vocabulary

Loss = Callable[..., tuple[jax.Array, dict[str, Mean]]]
"""(params, batch) -> (loss summed over targets, metrics)."""


@functools.cache
def model(V: int, **options) -> Model:
  """The decoder of the bars: 4 layers of width 256, 4 heads, MLP width 704, untied head."""
  sizes = dict(layers=4, width=256, heads=4, mlp_width=704, tie_embeddings=False)
  return Model(ModelConfig(**sizes | options), V)


def params(model: Model):
  """Fresh ones."""
  return jax.jit(model.init)(jax.random.key(0))


def batch(B: int, T: int, V: int) -> Batch:
  """Rows of one document each, random tokens, every target counted."""
  tokens = np.random.default_rng(0).integers(V, size=(B, T + 1), dtype=np.int32)
  return Batch(
    tokens_BT=jnp.asarray(tokens[:, :-1]),
    targets_BT=jnp.asarray(tokens[:, 1:]),
    weights_BT=jnp.ones((B, T)),
    segments_BT=jnp.ones((B, T), jnp.int32),
    positions_BT=jnp.broadcast_to(jnp.arange(T), (B, T)),
    ids_B=jnp.arange(B, dtype=jnp.uint32),
  )


def vocabulary(V: int, document: int = 0) -> Vocabulary:
  """V tokens of one byte each; `document` is the border."""
  return Vocabulary(V, document, np.ones(V, np.int32), np.zeros(V, np.int8))


def endless(V: int) -> Vocabulary:
  """`vocabulary` whose border is a control row, which is never drawn: decoding goes on to its last token."""
  return vocabulary(V, document=V)


def loss(model: Model, thought: ThoughtConfig, goal: ObjectiveConfig) -> Loss:
  """The package's loss, with rows of one document."""

  def total(params, batch):
    layout = place(batch, thought, vocabulary(model.vocabulary_size), aligned=0)
    return objective(goal, rollout(model, thought, params, batch, layout, jax.random.key(1)))

  return total


def plain(model: Model) -> Loss:
  """The thinking code with n = 0."""
  return loss(model, ThoughtConfig(length=0), ObjectiveConfig())


def gradient(total: Loss):
  """(params, batch) -> gradient of the sum."""
  return jax.grad(lambda params, batch: total(params, batch)[0])


def work(model: Model, thought: ThoughtConfig, B: int, T: int) -> tuple[float, float]:
  """FLOPs that the gradient of a batch needs, and bytes that it moves, by the ledger."""
  V = model.vocabulary_size
  moved = gradient_traffic(model.config, thought, V, T, model.size, rows=B, aligned=0)
  return B * ledger(model.config, V, thought, T, aligned=0, gradient=True).floor, moved.total


def train_step(model: Model, total: Loss, accumulation: int = 1):
  """(step of a TrainState and a batch, the state before the first one): AdamW with clipping."""
  config = OptimizerConfig(schedule="constant")
  optimizer = make_optimizer(config, model.axes)
  loss_fn = lambda params, batch, key, carried: total(params, batch)
  step = make_train_step(loss_fn, optimizer, make_schedule(config, 1000), StepConfig(accumulation))
  state = state_lib.create(params(model), optimizer, ema=False)
  return (lambda state, batch: step(state, batch, jax.random.key(2))), state


def product_2d(x, w):
  """x @ w with the leading axes folded into one."""
  return jnp.dot(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], -1)


def norm(x, scale):
  """RMSNorm."""
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale["scale"]


def turn(x, positions_X11, base: float):
  """Rotary positions."""
  a, b = jnp.split(x, 2, axis=-1)
  half = a.shape[-1]
  angle = positions_X11 * base ** (-jnp.arange(half) / half)
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(q_BQHE, k_BSHE, v_BSHE, mask_QS):
  """Attention with a dense mask."""
  scores = jnp.einsum("bqhe,bkhe->bhqk", q_BQHE * q_BQHE.shape[-1] ** -0.5, k_BSHE)
  weights = jax.nn.softmax(jnp.where(mask_QS, scores, -1e30), axis=-1)
  return jnp.einsum("bhqk,bkhe->bqhe", weights, v_BSHE)


def rest(x, mixed, p, product: Callable = product_2d):
  """What comes after attention in a layer with the parameters p."""
  x = x + product(mixed, p["out"])
  h = norm(x, p["mlp_norm"])
  return x + product(jax.nn.silu(product(h, p["gate"])) * product(h, p["up"]), p["down"])


def written(model: Model, product: Callable = product_2d, unroll: bool = False) -> Loss:
  """The plain decoder by hand: no cache, no streams, no documents.

  Args:
    product: (x, w) -> x @ w. unroll: layers as Python's loop and not as a scan.
  """
  c = model.config

  def total(params, batch):
    B, T = batch.tokens_BT.shape
    positions_T11 = jnp.arange(T)[:, None, None]
    causal = jnp.tril(jnp.ones((T, T), bool))

    def layer(x, p):
      h = norm(x, p["attention_norm"])
      q, k, v = (product(h, p[name]).reshape(B, T, c.heads, -1) for name in ("query", "key", "value"))
      q, k = (turn(a, positions_T11, c.rope_base) for a in (q, k))
      return rest(x, attend(q, k, v, causal).reshape(B, T, -1), p, product), None

    x = params["embedding"][batch.tokens_BT] * c.width**0.5
    if unroll:
      for number in range(c.layers):
        x, _ = layer(x, jax.tree.map(lambda leaf, number=number: leaf[number], params["layers"]))
    else:
      x, _ = jax.lax.scan(layer, x, params["layers"])
    logits = product(norm(x, params["final_norm"]), params["head"])[..., : model.vocabulary_size]
    chosen = jnp.take_along_axis(logits, batch.targets_BT[..., None], axis=-1)[..., 0]
    sum_of_losses = jnp.sum(jax.nn.logsumexp(logits, axis=-1) - chosen)
    return sum_of_losses, dict(loss=Mean(sum_of_losses, jnp.float32(B * T)))

  return total
