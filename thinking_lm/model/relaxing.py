"""The relaxed copies of drawn single tokens (`thoughts.relaxed`), and what a head learns to say of them."""

import jax
import jax.numpy as jnp

from thinking_lm.thoughts import relaxed
from thinking_lm.thoughts.tokens import fold
from thinking_lm.types import Surrogate, Thoughts


def copies(decoder, drawer, config, before_BPD, tokens_BP, keys_BP) -> Thoughts:
  """Relaxed thoughts of one token, differentiable in the policy only.

  Args:
    decoder, drawer: with and without gradients to its parameters. before_BPD: the states that the tokens were drawn
      from, and keys_BP their random keys.
  """
  logits_BPV, keys_BP = decoder.logits(before_BPD), fold(keys_BP, config.length)  # 0 ... drew the thought
  return Thoughts(_mixed(drawer, config, logits_BPV, tokens_BP, keys_BP)[:, :, None], tokens_BP[..., None])


def learned(decoder, drawer, config, before_BPD, tokens_BP, keys_BP) -> Surrogate:
  """What the head `surrogate` says of the relaxed copies, [B, P, ...]; arguments as above.

  c(h, x), with h the state that a token was drawn from and x the embedding of its relaxed copy (RELAX, Grathwohl et al.
  2018, arXiv:1711.00123). Memory grows with anchors x samples x vocabulary, as that of `copies` does.
  """
  logits_BPV, keys_BP = decoder.logits(before_BPD), fold(keys_BP, config.length)
  fixed_BPD, fixed_BPV = jax.lax.stop_gradient((before_BPD, logits_BPV))

  def c(model, logits_BPV):
    x_BPD = _mixed(drawer, config, logits_BPV, tokens_BP, keys_BP)
    return model.heads["surrogate"](fixed_BPD, x_BPD)

  learned_BP, pull = jax.vjp(lambda logits_BPV: c(decoder, logits_BPV), fixed_BPV)
  drawn_BPV = jax.nn.one_hot(tokens_BP, fixed_BPV.shape[-1])
  return Surrogate(
    value_BGN=c(drawer, logits_BPV),
    learned_BGN=learned_BP,
    slope_BGNV=pull(jnp.ones_like(learned_BP))[0],
    score_BGNV=(drawn_BPV - jax.nn.softmax(fixed_BPV / config.temperature)) / config.temperature,
  )


def _mixed(drawer, config, logits_BPV, tokens_BP, keys_BP):
  """Embeddings [B, P, D] of the relaxed copies of tokens, differentiable in the policy's logits only."""
  logp_BPV = jax.nn.log_softmax(logits_BPV / config.temperature)
  z_BPV = relaxed.coupled(logp_BPV, tokens_BP, relaxed.noise(keys_BP, logp_BPV.shape[-1]))
  return drawer.mix(relaxed.weights(z_BPV, config.relaxation))
