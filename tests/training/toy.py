"""A loss function, a data set and a main that keep the contracts of training and cost nothing."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from thinking_lm import errors, types
from thinking_lm.metrics import Mean
from thinking_lm.training import loop
from thinking_lm.training.checkpoint import CheckpointConfig
from thinking_lm.training.mesh import MeshConfig
from thinking_lm.training.optimizer import OptimizerConfig

V, D, F, L, T = 16, 8, 16, 2, 12

AXES = dict(
  embed=("vocab", "embed"),
  layers=dict(norm=("layers", "embed"), up=("layers", "embed", "mlp"), down=("layers", "mlp", "embed")),
  head=("embed", "vocab"),
)


def init(key):
  keys = jax.random.split(key, 4)
  normal = lambda key, *shape: 0.3 * jax.random.normal(key, shape)
  layers = dict(norm=jnp.ones((L, D)), up=normal(keys[1], L, D, F), down=normal(keys[2], L, F, D))
  return dict(embed=normal(keys[0], V, D), layers=layers, head=normal(keys[3], D, V))


def loss_fn(params, batch, key, carried):
  """Cross-entropy of a residual MLP with noise that derives from the example ids; rows differ in their weights."""
  del carried
  noise_BD = jax.vmap(lambda id_: jax.random.normal(jax.random.fold_in(key, id_), (D,)))(batch.ids_B)
  x_BTD = params["embed"][batch.tokens_BT] + 0.1 * noise_BD[:, None]

  def layer(x_BTD, p):
    return x_BTD + jax.nn.gelu((x_BTD * p["norm"]) @ p["up"]) @ p["down"], None

  x_BTD, _ = jax.lax.scan(layer, x_BTD, params["layers"])
  logp_BTV = jax.nn.log_softmax(x_BTD @ params["head"])
  loss_BT = -jnp.take_along_axis(logp_BTV, batch.targets_BT[..., None], axis=-1)[..., 0]
  loss = Mean.of(loss_BT, batch.weights_BT)
  tokens = jnp.sum(batch.segments_BT > 0).astype(jnp.float32)
  real = Mean(tokens, jnp.float32(batch.ids_B.shape[0]))
  return loss.total, dict(loss=loss, nats=loss, bytes=Mean(tokens, tokens), real_tokens=real)


class Data:
  """Rows that follow from their id alone; `sleep` seconds a batch, so that a signal finds the run at work."""

  digest = "toy"

  def __init__(self, sleep=0.0):
    self.sleep = sleep

  def rows(self, ids):
    tokens_BT = np.stack([np.random.default_rng(int(i)).integers(0, V, T + 1) for i in ids]).astype(np.int32)
    length_B = np.asarray(ids) % (T - 1) + 1
    weights_BT = (np.arange(T) < length_B[:, None]).astype(np.float32)
    return types.Batch(
      tokens_BT=tokens_BT[:, :-1],
      targets_BT=(tokens_BT[:, :-1] * 3 + 1) % V,
      weights_BT=weights_BT,
      segments_BT=weights_BT.astype(np.int32),
      positions_BT=np.broadcast_to(np.arange(T, dtype=np.int32), weights_BT.shape),
      ids_B=np.asarray(ids, np.uint32),
    )

  def batches(self, split, *, global_batch, start_step, share):
    step = start_step
    while True:
      time.sleep(self.sleep)
      yield self.rows(step * global_batch + np.array(share))
      step += 1


def make_run(
  steps=6, every=2, loss=loss_fn, data=None, train=None, optimizer=None, mesh=None, checkpoint=None, hooks=()
):
  """A run of the toy on 8 devices."""
  train = dict(dict(steps=steps, batch_size=16, log_every=1, tensorboard=False), **(train or {}))
  sections = dict(
    train=loop.TrainConfig(**train),
    checkpoint=CheckpointConfig(every=every, **(checkpoint or {})),
    optimizer=OptimizerConfig(**dict(dict(learning_rate=1e-2, ema=0.9, warmup_steps=2), **(optimizer or {}))),
    mesh=MeshConfig(**(mesh or {})),
  )
  resolved = {name: vars(section) for name, section in sections.items()}
  return loop.Run(init, AXES, loss, data or Data(), resolved_config=resolved, hooks=hooks, **sections)


if __name__ == "__main__":
  WORKDIR = flags.DEFINE_string("workdir", None, "as of thinking_lm.train")
  STEPS = flags.DEFINE_integer("steps", 6, "train.steps")
  SLEEP = flags.DEFINE_float("sleep", 0.0, "seconds each batch takes")

  def main(argv):
    loop.train(make_run(STEPS.value, data=Data(SLEEP.value), train=dict(tensorboard=True)), WORKDIR.value)

  errors.run(main)
