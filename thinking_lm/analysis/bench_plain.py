"""Suite `plain`: the training step without thoughts, optimizer included."""

from collections.abc import Iterator

from thinking_lm.analysis import bench_problem as problem
from thinking_lm.analysis import peers
from thinking_lm.analysis.bench import Bar, Case, Variant, ratio
from thinking_lm.objectives.objective import ObjectiveConfig
from thinking_lm.thoughts.spec import ThoughtConfig

SHAPES = ((256, 16, 256, 1.8), (32_000, 4, 256, 1.3))
"""V, B, T, and the bar on the speed over `naive`. A decoder that multiplies activations [B, T, D] by weights as they
are was as fast as nanodo (2,188 and 2,207 tokens/s at the first shape), whose place it takes here."""

EINSUM, CHUNKED = dict(attention="einsum"), dict(attention="chunked")

OPTIONS = dict(
  ours=({}, 1),
  ours_remat=(dict(remat="full"), 1),
  ours_micro=({}, 4),
  ours_micro_unroll=(dict(unroll=4), 4),
  ours_micro_unroll_blocks=(dict(unroll=4, query_blocks=4), 4),
  ours_bf16=(dict(compute_dtype="bfloat16"), 1),
  ours_bf16_micro_unroll_blocks=(dict(compute_dtype="bfloat16", unroll=4, query_blocks=4), 4),
)
"""Options of the model, and the number of micro-batches."""

BACKENDS = dict(
  einsum=EINSUM,
  einsum_blocks=EINSUM | dict(query_blocks=4),
  chunked=CHUNKED,
  chunked_blocks=CHUNKED | dict(query_blocks=4),
)
"""Options of the model that say how attention is computed."""

NOTHING = ThoughtConfig(placement="every", topology="private", kind="sampled", length=0)
"""Every token could be followed by a thought, of no tokens."""


def cases() -> Iterator[Case]:
  """Our step in its options, against a naive and a hand-written one; what n = 0 costs; backends of attention."""
  bars = lambda speed: (
    Bar(
      "naive / our fastest float32", lambda r: max(ratio(r, "naive", name) for name in _ours(bf16=False)), speed, False
    ),
    Bar("bfloat16 / float32, the fastest of each", lambda r: _fastest(r, bf16=True) / _fastest(r, bf16=False), 1.0),
  )
  for V, B, T, speed in SHAPES:
    held = (*bars(speed), PEER) if peers.installed() else bars(speed)
    yield Case(f"V{V}_B{B}_T{T}", lambda V=V, B=B, T=T: list(variants(V, B, T)), held)
    yield Case(f"V{V}_B{B}_T{T}_n0", lambda V=V, B=B, T=T: list(nothing(V, B, T)), NOTHING_BARS)

  for B, T in ((8, 256), (1, 2048)):
    yield Case(f"attention_B{B}_T{T}", lambda B=B, T=T: list(backends(B, T)))


def backends(B: int, T: int) -> Iterator[Variant]:
  """The gradient of the plain loss by backend of attention, with a vocabulary that costs little."""
  for name, options in BACKENDS.items():
    model = problem.model(512, **options)
    work = problem.work(model, ThoughtConfig(length=0), B, T)
    step = problem.gradient(problem.plain(model))
    yield Variant(name, step, (problem.params(model), problem.batch(B, T, 512)), *work, B * T)


PEER = Bar(
  "Hugging Face's Llama on PyTorch / our fastest float32",
  lambda r: max(ratio(r, "hugging_face", name) for name in _ours(bf16=False)),
  0.8,
  at_most=False,
)
"""The bar is that on nanoGPT, a smaller program on the same library."""

NOTHING_BARS = (
  Bar("thinking code with n = 0 / by hand", lambda r: ratio(r, "n0", "by_hand"), 1.03),
  Bar("the same, FLOPs by XLA", lambda r: r["n0"].xla_flops / r["by_hand"].xla_flops, 1.01),
)


def nothing(V: int, B: int, T: int) -> Iterator[Variant]:
  """The gradient of the plain decoder by hand, and of the package's loss with thoughts of length 0."""
  model = problem.model(V)
  work = problem.work(model, ThoughtConfig(length=0), B, T)
  totals = dict(by_hand=problem.written(model), n0=problem.loss(model, NOTHING, ObjectiveConfig()))
  for name, total in totals.items():
    yield Variant(name, problem.gradient(total), (problem.params(model), problem.batch(B, T, V)), *work, B * T)


def _ours(bf16: bool) -> list[str]:
  return [name for name in OPTIONS if ("bf16" in name) == bf16]


def _fastest(results, bf16: bool) -> float:
  return min(results[name].median for name in _ours(bf16))


def variants(V: int, B: int, T: int) -> Iterator[Variant]:
  """By hand as in many a decoder, by hand with 2-D products and a scan over layers, ours, and a peer if installed."""
  model, batch = problem.model(V), problem.batch(B, T, V)
  work = problem.work(model, ThoughtConfig(length=0), B, T)
  by_hand = dict(by_hand=problem.written(model), naive=problem.written(model, product=lambda x, w: x @ w, unroll=True))
  for name, total in by_hand.items():
    step, state = problem.train_step(model, total)
    yield Variant(name, step, (state, batch), *work, B * T)
  for name, (options, accumulation) in OPTIONS.items():
    model = problem.model(V, **options)
    step, state = problem.train_step(model, problem.plain(model), accumulation)
    yield Variant(name, step, (state, batch), *work, B * T)
  if peers.installed():
    yield Variant("hugging_face", peers.train_step(V, B, T), (), *work, B * T, compiled=False)
