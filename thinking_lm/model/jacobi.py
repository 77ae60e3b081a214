"""Jacobi iterations of a persistent stream: all think tokens at once, again and again, in place of one after another.

The think tokens of a serial stream solve z = f(h(z)): each is made from the hidden state before it, which every earlier
one is seen by. A pass runs all slots in parallel and makes the next guess of all think tokens from its hidden states
(PonderLM-2, arXiv:2509.23184). Only causality makes that exact: each pass puts at least one more think token of a row
right, so that T n + 1 passes over a row with T thoughts are the serial stream, and fewer are an approximation, also of
the gradient. The residual says how far a guess is from solving the equation.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from thinking_lm.thoughts import topology
from thinking_lm.types import Thoughts


def stream_iterated(decoder, config, stream: topology.Stream, layout, known_BSD, run):
  """Thinks along a stream by `config.iterations` passes.

  The first guess is the embedding of PAUSE. Gradients flow through the last `config.through` passes (0: all) and not
  into the guess that they start from.

  Args:
    known_BSD: inputs of the real slots.
    run: (decoder, known_BSD, Thoughts) -> hidden_BSD of all slots, with these think tokens.

  Returns:
    (hidden_BSD of the last pass, the Thoughts that it was fed, residual_BN: |z' - z| / |z'| of each thought, where z'
    is what one more pass would be fed).
  """
  B, N = layout.anchors_BN.shape
  source_BX = _sources(config, stream, layout).reshape(B, -1)

  def guesses(decoder, known_BSD):
    def one(carry, _):
      fed = carry[1]
      hidden_BSD = run(decoder, known_BSD, fed)
      source_BXD = jnp.take_along_axis(hidden_BSD, source_BX[..., None], axis=1)
      source_BNnD = source_BXD.reshape(B, N, config.length, -1)
      return (fed, Thoughts(*config.kind_of.step(decoder, source_BNnD, None, config)), hidden_BSD), None

    return one

  shape = (B, N, config.length)
  first = Thoughts(decoder.embed_row(decoder.pause, *shape), jnp.full(shape, -1))
  through = config.through or config.iterations
  carry = (first, first, jnp.zeros_like(known_BSD))
  if config.iterations > through:
    graph, params = nnx.split(decoder)
    params, known, carry = jax.lax.stop_gradient((params, known_BSD, carry))
    carry, _ = jax.lax.scan(guesses(nnx.merge(graph, params), known), carry, length=config.iterations - through)
  (fed, more, hidden_BSD), _ = jax.lax.scan(guesses(decoder, known_BSD), carry, length=through)
  return hidden_BSD, fed, _residual(more.inputs_BGNJD, fed.inputs_BGNJD)


def _sources(config, stream, layout):
  """source_BNn: the slot that each think token is made from: the one before it, or the anchor."""
  last = stream.token_BS.shape[1] - 1
  source_BNn = stream.thought_BN[..., None] + config.opening + jnp.arange(config.length) - 1
  if not config.opening:  # padding may stand between an anchor and its thought
    source_BNn = source_BNn.at[..., 0].set(topology.take(stream.slot_BT, layout.anchors_BN, 0))
  return jnp.minimum(source_BNn, last)


def _residual(more_BNnD, fed_BNnD):
  more, fed = (jax.lax.stop_gradient(a).astype(jnp.float32) for a in (more_BNnD, fed_BNnD))
  size = lambda a: jnp.sqrt(jnp.sum(jnp.square(a), axis=(-2, -1)))
  return size(more - fed) / jnp.maximum(size(more), 1e-30)
