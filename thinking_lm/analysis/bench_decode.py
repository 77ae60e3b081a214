"""Suite `decode`: what it costs to sample thoughts with cached keys, in forward passes over as many tokens.

And what room that streams have and do not use costs them.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from thinking_lm.analysis import bench_problem as problem
from thinking_lm.analysis import peers
from thinking_lm.analysis.bench import Bar, Case, Variant, ratio
from thinking_lm.analysis.flops import ledger
from thinking_lm.model.decoder import Model
from thinking_lm.model.generate import Sampling, generate
from thinking_lm.model.rollout import rollout
from thinking_lm.model.segment import whole
from thinking_lm.model.streams import Streams
from thinking_lm.model.thinking import empty_cache
from thinking_lm.thoughts.placement import place
from thinking_lm.thoughts.spec import ThoughtConfig

V, T, n, NEW = 512, 128, 16, 32
PLAIN = ThoughtConfig(length=0)
THOUGHT = ThoughtConfig(placement="every", topology="private", kind="sampled", length=n)

COST = {1: 3.0, 4: 1.4}
"""B, and the bar on the cost of a think token in plain forward tokens. At B 1 a prototype in JAX that paid 5 of them
was 1.5 times as fast as Hugging Face's `generate`; 2.5 times as fast is 3 of them."""

FED, ROOMS = 120, (128, 512, 2048)
"""Slots that streams fill, and for how many they have room."""

UNUSED = 1.2
"""Bar on the time with the most room over that with the least. To make room, once, is in it."""

PEER = Bar("Hugging Face's generate / ours", lambda r: ratio(r, "hugging_face", "thoughts"), 2.5, at_most=False)


def cases() -> Iterator[Case]:
  """Thoughts at every position at once, which share the prefix; then continuations, all steps in one dispatch."""
  for B, limit in COST.items():
    bar = Bar("a think token / a plain forward token", lambda r: (ratio(r, "thoughts", "plain") - 1) / n, limit)
    bars = (bar, PEER) if _against_a_peer(B) else (bar,)
    yield Case(f"every_B{B}_T{T}_n{n}", functools.partial(thoughts, B), bars)
  for B in COST:
    yield Case(f"generate_B{B}_{NEW}", functools.partial(continuations, B))
  first, *_, last = map(str, ROOMS)
  bar = Bar(f"room for {last} slots / for {first}", lambda r: ratio(r, last, first), UNUSED)
  yield Case(f"unused_B8_{FED}", functools.partial(unused, 8), (bar,))


def _against_a_peer(B: int) -> bool:
  """At one row; at more, padded prefixes would take a peer minutes."""
  return B == 1 and peers.installed()


def _variant(name: str, model: Model, function, B: int, thought: ThoughtConfig, tokens: int) -> Variant:
  flops = B * ledger(model.config, V, thought, T, aligned=0, gradient=False).total
  return Variant(name, function, (problem.params(model), problem.batch(B, T, V)), flops, tokens=tokens)


def thoughts(B: int) -> list[Variant]:
  """Log-probabilities of a batch without thoughts; a thought after each of its tokens, by ours and by a peer.

  Tokens are think tokens.
  """
  model = problem.model(V)

  def drawn(params, batch):
    layout = place(batch, THOUGHT, problem.vocabulary(V), aligned=0)
    return rollout(model, THOUGHT, params, batch, layout, jax.random.key(1)).thoughts.tokens_BGNJ

  plain = lambda params, batch: problem.plain(model)(params, batch)[0]
  found = [
    _variant("plain", model, plain, B, PLAIN, B * T),
    _variant("thoughts", model, drawn, B, THOUGHT, B * T * n),
  ]
  if _against_a_peer(B):
    found.append(Variant("hugging_face", peers.thoughts(V, B, T, n), tokens=B * T * n, compiled=False))
  return found


def continuations(B: int) -> list[Variant]:
  """NEW tokens after prompts of T: the prompt alone, plain decoding, and a thought before every token."""
  model = problem.model(V)
  vocabulary = problem.endless(V)

  def decode(thought, count):
    return lambda params, batch: (
      generate(model, thought, params, batch, vocabulary, jax.random.key(0), Sampling(count)).tokens_BX
    )

  found = (("prompt_and_one", PLAIN, 1), ("plain", PLAIN, NEW), ("thoughts", THOUGHT, NEW))
  return [
    Variant(name, decode(thought, count), (problem.params(model), problem.batch(B, T, V)), tokens=B * count)
    for name, thought, count in found
  ]


def unused(B: int) -> list[Variant]:
  """As many latent think tokens of B streams, one a turn, whatever these have room for. Tokens are think tokens."""
  model = problem.model(V)

  def think(room, params, x_BGD):
    decoder = whole(model.bind(params))
    streams = Streams.begin(decoder, empty_cache(decoder, B, 1), jnp.ones((B, 1), bool), 1, room)

    def turn(carry, slot):
      x_BGD, streams = carry
      slot_BG = jnp.full((B, 1), slot)
      x_BGD, streams = streams.feed(decoder, x_BGD, slot_BG, slot_BG)
      return (x_BGD, streams), x_BGD[..., 0]

    return jax.lax.scan(turn, (x_BGD, streams), jnp.arange(FED))[1]

  x_BGD = jax.random.normal(jax.random.key(0), (B, 1, model.config.width))
  given = (problem.params(model), x_BGD)
  return [Variant(str(room), functools.partial(think, room), given, tokens=B * FED) for room in ROOMS]
