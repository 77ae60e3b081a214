"""What stands behind private thoughts: their end, who sees it, and the answers drawn there (`thoughts.answer`)."""

import jax
import jax.numpy as jnp

from thinking_lm.model.decoder import Cache, Decoder, Seen
from thinking_lm.model.thinking import cached, empty_cache
from thinking_lm.thoughts.tokens import draw, fold


def last(decoder, config, thoughts):
  """The last slot of each thought, int32, of Thoughts of any leading axes; -1 for one that ends before its first."""
  return config.last(config.used(thoughts, decoder.stop))


def end(config, anchor_BPD, hidden_BPXD, used_BP):
  """[B, P, 1, D]: the state that each private thought's target is read off: its last slot, or the anchor's."""
  last_BP = config.last(used_BP)[..., None, None]
  end_BP1D = jnp.take_along_axis(hidden_BPXD, jnp.maximum(last_BP, 0), axis=2)
  return jnp.where(last_BP < 0, anchor_BPD[:, :, None], end_BP1D)


def live(decoder, config, thoughts):
  """live_BPJ: the think slots of a private thought up to its end; all of them where all ends are scored."""
  return (jnp.arange(config.slots) <= last(decoder, config, thoughts)[..., None]) | config.learns_end


def mask(decoder, config, thoughts, A, behind):
  """mask_BPXX, bool, of the J slots of P private streams and so many tokens `behind` them (X = J + behind).

  Each sees those before it and itself, but no slot behind the thought's end. The first A of what stands behind are
  look-ahead tokens, which those of an answer after them do not see.
  """
  live_BPX = jnp.pad(live(decoder, config, thoughts), [(0, 0), (0, 0), (0, behind)], constant_values=True)
  slot_X = jnp.arange(config.slots + behind)
  ahead_X = (slot_X >= config.slots) & (slot_X < config.slots + A)
  apart_XX = (slot_X >= config.slots + A)[:, None] & ahead_X
  return (slot_X <= slot_X[:, None]) & ~apart_XX & live_BPX[:, :, None]


def tokens(decoder, ahead_BPAD, thoughts):
  """Inputs [B, P, X, D] of what stands behind thoughts: look-ahead tokens, and those of an answer but for its last."""
  if thoughts.answer_BGNA is None:
    return ahead_BPAD
  return jnp.concatenate([ahead_BPAD, decoder.embed(thoughts.answer_BGNA[..., :-1])], axis=2)


def answer(decoder, config, anchor_BPD, hidden_BPJD, positions_BPX, keys_BP, past, cache, thoughts, A: int):
  """The thoughts with an answer drawn behind each, through which no gradient flows.

  Args:
    anchor_BPD, hidden_BPJD: states of the anchors and of the think slots. positions_BPX: of the slots, A look-ahead
      tokens, and the answer. keys_BP: those that drew the thoughts. past: the prefix. cache: own keys of the slots.
  """
  end_BPD = end(config, anchor_BPD, hidden_BPJD, config.used(thoughts, decoder.stop))[:, :, 0]
  own = Seen(cache, live(decoder, config, thoughts))
  positions_BPF = positions_BPX[:, :, config.slots + A :]
  drawn_BPA = _answers(decoder, config, end_BPD, positions_BPF, keys_BP, past, own)
  return thoughts.replace(answer_BGNA=jax.lax.stop_gradient(drawn_BPA))


def _answers(decoder: Decoder, config, end_BPD, positions_BPF, keys_BP, past: Seen, own: Seen):
  """tokens_BPA, int32, the m = config.answer tokens that P thoughts go on with.

  Args:
    end_BPD: the state that predicts what comes after each thought. positions_BPF: of the first F = m - 1 of them.
    keys_BP: those that drew the thoughts. own: the thoughts' keys, mask [B, P, J] of those that exist.
  """
  m, edge = config.answer, end_BPD.shape[:2]

  def say(hidden_BPD, a):
    keys = fold(keys_BP, config.length + 1 + a)
    return draw(decoder.logits(hidden_BPD), keys, config.temperature).astype(jnp.int32)

  first_BP = say(end_BPD, 0)
  if m == 1:
    return first_BP[..., None]
  free = empty_cache(decoder, *edge, m - 1)
  cache = Cache(*(jnp.concatenate(pair, axis=3) for pair in zip(own.cache, free, strict=True)))
  run = cached(decoder, m - 1, edge, positions_BPF, past, Seen(cache, own.mask_BPQS[:, :, None]))

  def step(carry, a):
    token_BP, cache = carry
    hidden_BPD, cache = run(decoder.embed(token_BP), a, cache)
    token_BP = say(hidden_BPD, a + 1)
    return (token_BP, cache), token_BP

  rest_FBP = jax.lax.scan(step, (first_BP, cache), jnp.arange(m - 1))[1]
  return jnp.concatenate([first_BP[..., None], jnp.moveaxis(rest_FBP, 0, 2)], axis=2)
