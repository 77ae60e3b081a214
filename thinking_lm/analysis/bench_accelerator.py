"""Suite `accelerator`: plain, latent and private steps in bfloat16, of a size that a chip is busy with, and their MFU.

Like the other suites it takes the gradient of the loss. On a CPU it takes minutes a round and says nothing of a chip.
"""

from collections.abc import Iterator

from thinking_lm.analysis import bench_problem as problem
from thinking_lm.analysis.bench import Case, Variant
from thinking_lm.analysis.bench_chip import SIZES
from thinking_lm.analysis.bench_private import goal, thought
from thinking_lm.objectives.objective import ObjectiveConfig
from thinking_lm.thoughts.spec import ThoughtConfig

V, T, B = 32_000, 1024, 8

STEPS = dict(
  plain=(ThoughtConfig(length=0), ObjectiveConfig()),
  latent_stride64_n4=(ThoughtConfig(kind="latent", placement="stride", stride=64, length=4), ObjectiveConfig()),
  private_n8=(thought(8), goal(1)),
)
"""What thinks, and what it is trained by; latent thoughts as far apart as on the pods of configs/pod."""


def cases() -> Iterator[Case]:
  """One case without a bar: there are no figures of peers to set one by."""
  yield Case(f"bf16_D1024_V{V}_T{T}_B{B}", lambda: list(variants(V, T, B, **SIZES)))


def variants(V: int, T: int, B: int, **sizes) -> Iterator[Variant]:
  """The steps on the same rows; tokens are real ones."""
  model = problem.model(V, compute_dtype="bfloat16", **sizes)
  arguments = (problem.params(model), problem.batch(B, T, V))
  for name, (each, paid) in STEPS.items():
    total = problem.loss(model, each, paid)
    yield Variant(name, problem.gradient(total), arguments, *problem.work(model, each, B, T), B * T)
