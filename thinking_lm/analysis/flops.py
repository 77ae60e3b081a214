"""The ledger: analytic FLOPs of a row, split into what they are for.

Counted are matrix products as they are executed, masked entries and padded slots included (a multiply-add is two
FLOPs); norms, softmax and the optimizer are left out. XLA's own count takes the body of a loop once, whatever its trip
count, so that it checks these formulas only where every loop runs once; elsewhere the products of a traced program do.
"""

import dataclasses
from typing import NamedTuple

from thinking_lm.model.decoder import ModelConfig, table_rows
from thinking_lm.model.serial import segments
from thinking_lm.thoughts import halting
from thinking_lm.thoughts.placement import blocks, capacity, cuts
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.types import Layout


@dataclasses.dataclass(frozen=True)
class Ledger:
  """FLOPs of one row of T real tokens, all G samples together.

  base: layers over the real tokens. think: layers over think slots and look-ahead. readout: the head, for targets (of
  mixed predictions twice, and at every end that a thought may have if that is learned) and for the log-probabilities of
  drawn thoughts and answers. draw: making think tokens (logits and mixtures, and the entropy that they may end by), and
  for persistent rescored kinds the whole drawing pass, for parallel iterations all passes but the last. backward: the
  gradient, with what remat "full", the head and `model.replay` compute again (not the attention scores that "dots"
  does, and attention by chunks or kernels); 0 for a forward pass. Private thoughts are scored as they are drawn:
  their one head is in readout. beside: other passes of a training step, see `analysis.training`.
  """

  base: float
  think: float
  readout: float
  draw: float
  backward: float = 0.0
  beside: float = 0.0

  @property
  def total(self) -> float:
    """All of it."""
    return sum(dataclasses.asdict(self).values())

  @property
  def forward(self) -> float:
    """The forward pass."""
    return self.total - self.backward - self.beside

  @property
  def floor(self) -> float:
    """What a training step must do: each product once forward and twice backward, nothing drawn and scored apart."""
    return 3 * (self.base + self.think + self.readout)

  def times(self, number: float) -> "Ledger":
    """That of so many rows."""
    return Ledger(**{name: value * number for name, value in dataclasses.asdict(self).items()})


def replays(thought: ThoughtConfig) -> bool:
  """Whether the pass that draws the thoughts also scores them (model/replay.py)."""
  return thought.rescored and thought.topology == "private"


def beside_targets(thought: ThoughtConfig, N: int) -> tuple[float, float]:
  """(predictions at the ends that N private thoughts may have, predictions without them that are mixed in), numbers.

  That is beside the one prediction of each target.
  """
  ends = len(halting.exits(thought)) if thought.learns_end else 0
  mixed = thought.lookahead + ends if thought.mixing != "none" else 0
  return thought.samples * N * ends, thought.samples * N * mixed


def layer_flops(model: ModelConfig, queries: float, keys: float) -> float:
  """All layers over so many queries, each of which scores `keys` keys."""
  D, E = model.width, model.resolved_head_width
  weights = D * E * (2 * model.heads + 2 * model.resolved_kv_heads) + 3 * D * model.resolved_mlp_width
  return model.layers * queries * (2 * weights + 4 * model.heads * E * keys)


def head_flops(model: ModelConfig, vocabulary_size: int, thought: ThoughtConfig) -> float:
  """The language-model head for one state."""
  return 2.0 * model.width * table_rows(model, vocabulary_size, thought.confidences)


def causal_keys(model: ModelConfig, queries: int) -> float:
  """Keys that a query of a causal row scores: all of them, or with query blocks those up to the end of its block."""
  n = model.query_blocks
  if n == 1 or 2 * n > queries:
    return queries
  size = -(-queries // n)
  ends = [min(start + size, queries) for start in range(0, queries, size)]
  return sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False)) / queries


def ledger(
  model: ModelConfig,
  vocabulary_size: int,
  thought: ThoughtConfig,
  T: int,
  *,
  aligned: int,
  gradient: bool,
  given: bool = False,
) -> Ledger:
  """The ledger of a row of T tokens.

  Args:
    aligned: as of `placement.place`; decides how many slots a persistent stream has.
    gradient: with a backward pass: twice the forward products, and recomputation.
    given: the thoughts are there already, and only scored.
  """
  N = capacity(thought, T, aligned)
  head = head_flops(model, vocabulary_size, thought)
  if not N:
    base = layer_flops(model, T, causal_keys(model, T))
    return _with_backward(Ledger(base, 0.0, T * head, 0.0), model, gradient, 0.0, T)
  G, n = thought.samples, thought.length
  kind = thought.kind_of
  per_token = dict(pause=0.0, latent=0.0, soft=2 * head, noisy=2 * head, gumbel=2 * head, sampled=head)[thought.kind]
  if thought.kind == "latent" and model.latent_map == "linear":
    per_token = 2.0 * model.width**2
  parts = (_private if thought.topology == "private" else _persistent)(model, thought, T, N, aligned)
  base, base_serial, parallel, serial, ahead, makes, heads, queries, again, last = parts
  ends, mixed = beside_targets(thought, N)
  readout = (heads + ends + mixed) * head + mixed * 4.0 * model.width**2  # and the head `mix`
  readout += G * N * thought.answer * head  # its log-probability
  if kind.policy:
    readout += G * N * n * (head if kind.discrete else 2 * head)  # a density needs the mixture's mean as well
  if thought.iterations and not given:
    return _iterated(Ledger(base, parallel, readout, 0.0), G * N * n * per_token, thought, model, gradient, queries)
  if given or not thought.serial:
    return _with_backward(Ledger(base, parallel, readout, 0.0), model, gradient, 0.0, queries)
  answers, unlearned = G * N * thought.answer * per_token, makes * head if thought.halting == "entropy" else 0.0
  draw = makes * per_token + answers + unlearned
  if replays(thought):
    drawn = Ledger(base, serial + ahead, readout, answers + unlearned)
    # One pass over everything, never run forward, is gone through backwards from the inputs of every layer.
    backward = 2 * (base + parallel) + _again(model, base + parallel, queries) + 3 * readout
    return dataclasses.replace(drawn, backward=backward) if gradient else drawn
  if thought.rescored:
    once = base_serial + serial - last + draw
    return _with_backward(Ledger(base, parallel, readout, once), model, gradient, once, queries)
  once = Ledger(base_serial, serial + ahead, readout, draw)
  return _with_backward(once, model, gradient, unlearned, queries, again)


class _Parts(NamedTuple):
  """Forward FLOPs of layers, and counts, of a row with thoughts.

  base, base_serial: of real tokens in one pass, and where a serial stream computes them. parallel, serial: of thoughts,
  likewise. ahead: of the look-ahead. makes: think tokens made; before each a thought may end. heads: states that
  predict a target. queries: of one pass. again: what the backward pass of a serial stream computes again
  (model/reverse.py). last: its last segment, which a pass that only draws does without.
  """

  base: float
  base_serial: float
  parallel: float
  serial: float
  ahead: float
  makes: float
  heads: float
  queries: float
  again: float
  last: float


def _private(model: ModelConfig, thought: ThoughtConfig, T: int, N: int, aligned: int) -> _Parts:
  del aligned
  G, J, A = thought.samples, thought.slots, thought.lookahead - 1
  base = layer_flops(model, T, causal_keys(model, T))
  serial = G * N * layer_flops(model, J, T + J + (not replays(thought)))  # drawn in place, or behind a cache
  F = max(thought.answer - 1, 0)  # tokens of an answer that are fed, one by one when they are drawn
  serial += G * N * layer_flops(model, F, T + J + F) if F else 0.0
  A += F
  ahead = G * N * layer_flops(model, A, T + J + A) if A else 0.0
  parallel = G * N * layer_flops(model, J + A, T + J + A)
  makes, heads, queries = G * N * thought.length, T + G * N * thought.lookahead, T + G * N * (J + A)
  return _Parts(base, base, parallel, serial, ahead, makes, heads, queries, 0.0, 0.0)


def _persistent(model: ModelConfig, thought: ThoughtConfig, T: int, N: int, aligned: int) -> _Parts:
  G, J = thought.samples, thought.slots
  C, R = blocks(thought, T, N, aligned)
  sizes, tail = Layout(None, C, R, cuts=cuts(thought, T, N, aligned)).sizes(T)
  plan = segments(thought, sizes, tail)
  real, S = sum(sizes) + tail, sum(sizes) + tail + J * len(sizes)
  ends = [sum(shape.slots for shape in plan[: i + 1]) for i in range(len(plan))]
  # Keys and values are in the cache (a norm of keys needs their product all the same), and the activations of the last
  # segment, which is one call, are there.
  cached = 2 * model.width * model.resolved_head_width * model.resolved_kv_heads * (2 - model.qk_norm)
  again = [layer_flops(model, s.slots, A) - model.layers * s.slots * cached for s, A in zip(plan, ends, strict=True)]
  each = [(s.rounds * s.real, s.slots - s.rounds * s.real, A) for s, A in zip(plan, ends, strict=True)]
  return _Parts(
    base=G * layer_flops(model, real, causal_keys(model, S)),
    base_serial=G * sum(layer_flops(model, reals, A) for reals, _, A in each),
    parallel=G * layer_flops(model, S - real, causal_keys(model, S)),
    serial=G * sum(layer_flops(model, thinks, A) for _, thinks, A in each),
    ahead=0.0,
    makes=G * sum(shape.rounds * (1 + shape.singles) for shape in plan),
    heads=G * T,
    queries=G * S,
    again=G * sum(again[:-1]),
    last=G * layer_flops(model, plan[-1].slots, ends[-1]),
  )


def _iterated(
  once: Ledger, make: float, thought: ThoughtConfig, model: ModelConfig, gradient: bool, queries: float
) -> Ledger:
  """Parallel passes: all but the last one make think tokens, of `make` FLOPs a pass, and the residual does so again."""
  layers, passes = once.base + once.think, thought.iterations
  forward = dataclasses.replace(once, draw=(passes - 1) * layers + passes * make)
  if not gradient:
    return forward
  through = thought.through or passes
  backward = 2 * (through * layers + (through - 1) * make) + 3 * once.readout
  if model.remat == "full":
    backward += through * _again(model, layers, queries)
  return dataclasses.replace(forward, backward=backward)


def _again(model: ModelConfig, layers: float, queries: float) -> float:
  """What a backward pass computes again of `layers` FLOPs over so many queries: not the last product of each layer."""
  return layers - 2.0 * model.layers * queries * model.width * model.resolved_mlp_width


def _with_backward(
  forward: Ledger, model: ModelConfig, gradient: bool, untouched: float, queries: float, again: float = 0.0
) -> Ledger:
  """Adds the backward pass of everything but the `untouched` FLOPs, which no gradient flows through.

  `again`: FLOPs of layers that are computed again even where the model is not rematerialised.
  """
  if not gradient:
    return forward
  backward = 2 * (forward.total - untouched) + forward.readout  # the head is always recomputed
  if again:
    backward += again
  elif model.remat == "full":
    backward += _again(model, forward.base + forward.think, queries)
  return dataclasses.replace(forward, backward=backward)
