"""Suite `quiet_star`: our private step against a stand-in for Quiet-STaR's way to train the same thoughts.

The stand-in is ours, written from the paper (Zelikman et al. 2024, arXiv:2403.09629, section 4.2): it is not the
authors' code, and is kinder to it. Each think token of all positions is a full pass of T queries, whose keys are
concatenated to those of the passes before: a dense mask of T x T (j + 1), of which all but the causal prefix and the
diagonals is unused; everything is kept, and autodiff goes back through it. One head a pass makes the token, where the
authors' code has two and a product with one-hot rows; noise over the vocabulary draws it, as there. Where PyTorch and
transformers are installed their way is measured too (`peers.quiet_star`), second head and one-hot rows included.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from thinking_lm.analysis import bench_private, peers
from thinking_lm.analysis import bench_problem as problem
from thinking_lm.analysis.bench import Bar, Case, Variant, ratio
from thinking_lm.metrics import Mean
from thinking_lm.model.decoder import Model

SHAPES = (
  *((512, 256, 4, 16, 1.4), (32_000, 128, 1, 8, 2.3)),
  *((512, 128, 4, n, 1.0) for n in (1, 4, 8)),
)
"""V, T, B, n, and the bar on the stand-in's time over ours: never slower, also where there is least to gain. Measured
between frameworks, the authors' code and a prototype of ours were 1.28 and 2.08 apart at the first two."""


def cases() -> Iterator[Case]:
  """The gradients of both at each shape."""
  for V, T, B, n, limit in SHAPES:
    names = dict(stand_in="stand-in for Quiet-STaR / ours")
    if peers.installed():
      names["published"] = "Quiet-STaR as published, in PyTorch / ours"
    bars = tuple(
      Bar(text, lambda r, name=name: ratio(r, name, "private"), limit, at_most=False) for name, text in names.items()
    )
    yield Case(f"V{V}_T{T}_B{B}_n{n}", functools.partial(variants, V, T, B, n), bars)


def variants(V: int, T: int, B: int, n: int) -> list[Variant]:
  """Both take the gradient of the same objective: NLL without and with a thought, and REINFORCE on the gain."""
  model, thought, goal = problem.model(V), bench_private.thought(n), bench_private.goal(1)
  work = problem.work(model, thought, B, T)
  arguments = (problem.params(model), problem.batch(B, T, V))
  totals = dict(private=problem.loss(model, thought, goal), stand_in=stand_in(model, n))
  tokens = (1 + n) * B * T
  found = [Variant(name, problem.gradient(total), arguments, *work, tokens) for name, total in totals.items()]
  if peers.installed():
    found.append(Variant("published", peers.quiet_star(V, B, T, n), (), *work, tokens, compiled=False))
  return found


def stand_in(model: Model, n: int, draw: Callable = jax.random.categorical) -> problem.Loss:
  """(params, batch) -> (loss, metrics `base` and `after`: -log p of the targets without and with thoughts).

  Args:
    draw: (key, logits) -> tokens.
  """
  V = model.vocabulary_size

  def total(params, batch):
    B, T = batch.tokens_BT.shape
    run = passes(model, params)
    causal, own = jnp.tril(jnp.ones((T, T), bool)), jnp.eye(T, dtype=bool)
    logits = lambda hidden: problem.product_2d(hidden, params["head"])[..., :V]
    logp_of = lambda logits, tokens: jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
    after_BTV = logits(run(batch.tokens_BT, batch.positions_BT, causal))
    base_BT, log_pi_BT, mask = logp_of(after_BTV, batch.targets_BT), 0.0, causal
    for j in range(n):
      token_BT = draw(jax.random.fold_in(jax.random.key(1), j), jax.lax.stop_gradient(after_BTV))
      log_pi_BT += logp_of(after_BTV, token_BT)
      mask = jnp.concatenate([mask, own], axis=1)
      after_BTV = logits(run(token_BT, batch.positions_BT + 1 + j, mask))
    logp_BT = logp_of(after_BTV, batch.targets_BT)
    gain_BT = jax.lax.stop_gradient(logp_BT - base_BT)
    count = jnp.float32(B * T)
    metrics = dict(base=Mean(-base_BT.sum(), count), after=Mean(-logp_BT.sum(), count))
    return -jnp.sum(base_BT + logp_BT + gain_BT * log_pi_BT), metrics

  return total


def passes(model: Model, params) -> Callable:
  """(tokens_BT, positions_BT, mask_TS) -> hidden_BTD: each call sees the keys of all calls before it, then its own."""
  c = model.config
  keys: list[list] = [[] for _ in range(c.layers)]
  values: list[list] = [[] for _ in range(c.layers)]

  def run(tokens_BT, positions_BT, mask_TS):
    B, T = tokens_BT.shape
    x = params["embedding"][tokens_BT] * c.width**0.5
    for number in range(c.layers):
      p = jax.tree.map(lambda leaf, number=number: leaf[number], params["layers"])
      h = problem.norm(x, p["attention_norm"])
      q, k, v = (problem.product_2d(h, p[name]).reshape(B, T, c.heads, -1) for name in ("query", "key", "value"))
      q, k = (problem.turn(a, positions_BT[..., None, None], c.rope_base) for a in (q, k))
      keys[number].append(k)
      values[number].append(v)
      mixed = problem.attend(q, *(jnp.concatenate(a[number], axis=1) for a in (keys, values)), mask_TS)
      x = problem.rest(x, mixed.reshape(B, T, -1), p)
    return problem.norm(x, params["final_norm"])

  return run
