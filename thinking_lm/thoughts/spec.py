"""The config section of a thought: the four questions, and which answers cannot be combined."""

import dataclasses

import jax.numpy as jnp

from thinking_lm.config import option
from thinking_lm.thoughts import halting, report
from thinking_lm.thoughts.halting import HALTING
from thinking_lm.thoughts.mixing import MIXING
from thinking_lm.thoughts.placement import BY_NEED, PLACEMENTS
from thinking_lm.thoughts.tokens import KINDS
from thinking_lm.thoughts.topology import ROTARY, TOPOLOGIES
from thinking_lm.types import Thoughts


@dataclasses.dataclass(frozen=True)
class ThoughtConfig:
  """WHERE thoughts go, WHICH keys they see, WHAT they are and WHEN they end. length = 0 is the plain decoder."""

  placement: str = option("every", "WHERE: which real tokens are followed by a thought", choices=PLACEMENTS)
  stride: int = option(8, "placement=stride: think after every so many tokens of a document", low=1)
  positions: tuple[int, ...] = option((), "placement=explicit: think after these positions of each document", low=0)
  cap: int = option(0, "most thoughts in a document, the first ones; 0: as many as the placement says", low=0)
  room: int = option(
    0,
    "thoughts that a row has room for, the first ones; others are dropped and counted as thoughts_dropped. 0: as many "
    "as there can be (sentence needs a number)",
    low=0,
  )
  need_above: float = option(2.0, "placement=entropy: nats of the next token's entropy above which to think", low=0)
  proxy: str = option(
    "", "placement=entropy: work directory of a frozen model whose entropy counts; '': the model's own"
  )
  topology: str = option("persistent", "WHICH: who sees a thought", choices=TOPOLOGIES)
  rotary: str = option("anchor", "rotary positions: thoughts advance them, or share their anchor's", choices=ROTARY)
  kind: str = option("latent", "WHAT: the kind of a think token", choices=KINDS)
  length: int = option(0, "n think tokens in a thought, START and STOP not counted; 0 is the plain decoder", low=0)
  delimiters: bool = option(False, "put the START and STOP rows around the think tokens")
  temperature: float = option(1.0, "of soft, noisy, gumbel, sampled; sampled at 0 is the most likely token", low=0)
  temperature_end: float = option(0.0, "gumbel: temperature at the end of its decay; 0 keeps it constant", low=0)
  temperature_steps: int = option(0, "gumbel: training steps of that decay, by the same factor each", low=0)
  noise: float = option(0.3, "noisy: standard deviation of the noise; an input has about 1 per dimension", above=0)
  relaxation: float = option(0.0, "sampled: temperature of the relaxed copy for objective.control; 0 makes none", low=0)
  top_k: int = option(0, "soft, noisy: keep only the k most likely tokens and renormalise; 0 keeps all", low=0)
  halting: str = option(
    "fixed",
    "WHEN: fixed length; where STOP is drawn; where entropy is low; where a head says so, at any state (ponder) or at "
    "the anchor (router: all n tokens or none)",
    choices=HALTING,
  )
  stop_below: float = option(1.0, "halting=entropy: entropy of the next token, nats, at which a thought ends", low=0)
  stop_at: float = option(
    0.5, "ponder, router: probability of having ended at which a thought does; 0 draws its end", low=0, high=1
  )
  mixing: str = option(
    "none",
    "private: how the predictions with a thought and without are mixed, by a learned weight: probability (a weight in "
    "[0, 1]), or logit, the original one that nothing bounds",
    choices=MIXING,
  )
  report: int = option(
    0, "sampled: the last 2m of the n think tokens are m (candidate, confidence) pairs; 0: none", low=0
  )
  bins: int = option(11, "report: how many confidences there are, from 0 to 1 at equal steps", low=2)
  answer: int = option(
    0, "private, sampled or noisy: real tokens that are drawn behind a thought, for a reward to judge; 0: none", low=0
  )
  iterations: int = option(
    0,
    "latent, soft in the context: train on so many parallel passes, an approximation (model/jacobi.py); 0 thinks one "
    "token after another, exactly, as decoding always does",
    low=0,
  )
  through: int = option(0, "iterations: passes that gradients flow through, the last ones; 0: all", low=0)
  samples: int = option(1, "G thoughts drawn per anchor (private) or streams per row (persistent)", low=1)
  lookahead: int = option(1, "m real tokens that make a thought's outcome; 0 is the rest of the document", low=0)
  rescore: bool = option(
    True,
    "sampled, noisy: draw without gradients, then score all in one parallel pass; false differentiates the drawing "
    "scan, of noisy through the mixture",
  )

  def faults(self) -> list[str]:
    """Combinations that mean nothing, each with its reason."""
    found = []
    kind = KINDS.get(self.kind)
    if self.length and kind and not kind.stochastic and self.samples > 1:
      found.append(f"samples {self.samples} of kind {self.kind!r} would all be equal: it draws nothing; use samples 1")
    if self.length and kind and kind.discrete and not self.temperature and self.samples > 1:
      found.append(f"samples {self.samples} at temperature 0 would all be equal; use samples 1")
    if self.noise != ThoughtConfig.noise and self.kind != "noisy":
      found.append(f"noise is read by kind 'noisy' only, got kind {self.kind!r}")
    if self.top_k and self.kind not in ("soft", "noisy"):
      found.append(f"top_k is read by kinds 'soft' and 'noisy' only, got kind {self.kind!r}")
    if self.topology == "private" and self.lookahead == 0:
      found.append(
        "lookahead 0 (the rest of the document) needs topology 'persistent': a private thought is seen by "
        "its own look-ahead only; give a number of tokens"
      )
    if kind and kind.weighs and not kind.discrete and self.temperature == 0:
      found.append(f"kind {self.kind!r} needs a temperature above 0; a very small one is nearly hard")
    if kind and not kind.weighs and self.temperature != ThoughtConfig.temperature:
      found.append(f"temperature is not read by kind {self.kind!r}, which draws nothing; leave it at 1")
    if 0 < self.temperature < 1e-3:
      found.append(f"temperature {self.temperature} is neither 0 (the most likely token) nor at least 0.001")
    found += self._schedule_faults() + self._relaxation_faults()
    if self.placement == "explicit" and not self.positions:
      found.append("placement 'explicit' needs positions, such as (3, 7)")
    if self.length and self.placement in ("sentence", "entropy") and not self.room:
      found.append(
        f"placement {self.placement!r} needs room: shapes are static, and every token of a row could be marked"
      )
    if self.proxy and self.placement not in BY_NEED:
      found.append(f"proxy is read by placement 'entropy' only, got {self.placement!r}")
    if self.length and kind and self.halting in HALTING and HALTING[self.halting].draws and not kind.discrete:
      found.append(f"halting {self.halting!r} needs kind 'sampled', which can draw STOP; got {self.kind!r}")
    if self.halting in HALTING and self.learns_end and (self.topology != "private" or self.lookahead != 1):
      found.append(
        f"halting {self.halting!r} needs topology 'private' and lookahead 1: a head learns from the loss after every "
        "length, and there each target has one thought. The end of a persistent thought changes all tokens behind it: "
        "ends multiply over the thoughts of a document, and even a single thought would take a pass for each"
      )
    if self.length and self.mixing != "none" and self.topology != "private":
      found.append("mixing needs topology 'private': with 'persistent' there is no prediction without thoughts")
    if self.length and self.delimiters and self.halting in HALTING and HALTING[self.halting].odds:
      found.append(f"halting {self.halting!r} ends a thought at a state, without a STOP: set delimiters to false")
    found += self._report_faults() + self._answer_faults() + self._iteration_faults()
    if self.length and self.placement == "none":
      found.append("placement 'none' never thinks; set length 0 or another placement")
    return found

  def _schedule_faults(self) -> list[str]:
    """Of the temperature's decay."""
    if not self.temperature_end and not self.temperature_steps:
      return []
    if self.kind != "gumbel":
      return [
        f"temperature_end and temperature_steps are read by kind 'gumbel' only, got kind {self.kind!r}: there a "
        "temperature shapes the gradient and not what is drawn, so that an evaluation need not know the step"
      ]
    if not self.temperature_end or not self.temperature_steps:
      return ["temperature_end and temperature_steps go together: set both above 0, or neither"]
    return ["temperature_end must be 0 or at least 0.001"] if self.temperature_end < 1e-3 else []

  def _relaxation_faults(self) -> list[str]:
    """Of REBAR's relaxed thoughts, which are made for single tokens that nothing else sees."""
    wanted = dict(kind="sampled", topology="private", length=1, halting="fixed", mixing="none", rescore=True)
    if not self.relaxation:
      return []
    got = ", ".join(f"{name} {getattr(self, name)!r}" for name in wanted if getattr(self, name) != wanted[name])
    if got or not self.temperature:
      needs = ", ".join(f"{name} {value!r}" for name, value in wanted.items())
      return [f"relaxation needs {needs} and a temperature above 0, got {got or 'temperature 0'}"]
    return ["relaxation must be 0 or at least 0.001"] if self.relaxation < 1e-3 else []

  def _iteration_faults(self) -> list[str]:
    """Of thoughts that parallel passes would approximate."""
    if self.through > self.iterations:
      return [f"through {self.through} of {self.iterations} iterations: there are not so many passes"]
    if not self.iterations or not self.length:
      return []
    found, kind = [], KINDS.get(self.kind)
    if kind and (kind.stochastic or not kind.serial):
      found.append(
        f"iterations guess think tokens that follow from the hidden state before them: kind 'latent' or 'soft', got "
        f"{self.kind!r}"
      )
    if self.topology == "private":
      found.append("iterations need topology 'persistent': private ones are made side by side anyway")
    if self.halting in HALTING and self.may_end:
      found.append(f"iterations need halting 'fixed', got {self.halting!r}: an end would move from pass to pass")
    return found

  def at(self, step) -> "ThoughtConfig":
    """The config at a training step: its temperature there, as a traced number.

    temperature (end / temperature)^(step / temperature_steps), then constant (exponential annealing, Jang et al. 2016,
    arXiv:1611.01144, without their floor at every so many steps).
    """
    if not self.temperature_end:
      return self
    share = jnp.minimum(jnp.asarray(step, jnp.float32) / self.temperature_steps, 1.0)
    return dataclasses.replace(
      self, temperature=self.temperature * (self.temperature_end / self.temperature) ** share, temperature_end=0.0
    )

  def _report_faults(self) -> list[str]:
    """What a spoken distribution asks of its thought."""
    found = []
    if self.report and self.kind != "sampled":
      found.append(f"report needs kind 'sampled', whose tokens can be words; got {self.kind!r}")
    if self.report and self.halting not in report.HALTING:
      known = " or ".join(map(repr, report.HALTING))
      found.append(f"report needs halting {known}, got {self.halting!r}: others do not say where it would begin")
    if self.report and self.free < 0:
      found.append(f"report {self.report} takes {2 * self.report} of a thought's think tokens; length is {self.length}")
    return found

  def _answer_faults(self) -> list[str]:
    """What an answer asks of its thought."""
    if not self.answer or not self.length:
      return ["answer needs thought.length above 0: it is drawn behind a thought"] if self.answer else []
    found = []
    if self.kind in KINDS and not KINDS[self.kind].policy:
      found.append(f"answer needs kind 'sampled' or 'noisy', whose policy it is a part of; got {self.kind!r}")
    if self.topology != "private":
      found.append("answer needs topology 'private': in a persistent stream the real tokens to come would see it")
    if self.mixing != "none" or self.relaxation or (self.halting in HALTING and self.learns_end):
      found.append(
        "answer needs mixing 'none', relaxation 0 and a halting without a head: it has one state to go on from"
      )
    return found

  @property
  def free(self) -> int:
    """Think tokens that are not of the report."""
    return self.length - 2 * self.report

  @property
  def confidences(self) -> int:
    """Rows of the embedding table that stand for a confidence."""
    return self.bins if self.length and self.report else 0

  @property
  def slots(self) -> int:
    """J, the slots that one thought takes: its think tokens and the delimiters around them."""
    return self.opening + self.length + self.closing if self.length else 0

  @property
  def opening(self) -> int:
    """Slots of a thought before its first think token."""
    return int(self.delimiters)

  @property
  def closing(self) -> int:
    """Slots of STOP at the end of a thought."""
    return int(self.delimiters or self.may_stop)

  @property
  def may_stop(self) -> bool:
    """Whether STOP is among the tokens that may be drawn."""
    return HALTING[self.halting].draws

  @property
  def may_end(self) -> bool:
    """Whether a thought may use fewer than its n think tokens."""
    return self.may_stop or HALTING[self.halting].odds is not None

  @property
  def by_need(self) -> bool:
    """Whether the placement asks for `Batch.need_BT`."""
    return bool(self.length and self.placement in BY_NEED)

  @property
  def learns_end(self) -> bool:
    """Whether a head decides when a thought ends."""
    return bool(self.length and HALTING[self.halting].head)

  @property
  def draws_end(self) -> bool:
    """Whether a thought's end is drawn, apart from its tokens."""
    return self.learns_end and not self.stop_at

  @property
  def random(self) -> bool:
    """Whether thinking needs random keys."""
    return bool(self.length and (self.kind_of.stochastic or self.draws_end))

  def used(self, thoughts: Thoughts, stop: int):
    """used_X, the think tokens of each thought before its end; `stop` is the STOP row."""
    if thoughts.used_BGN is None:
      return halting.used(self, thoughts.tokens_BGNJ, stop)
    return thoughts.used_BGN

  def last(self, used_X):
    """The last slot of a thought that uses so many think tokens, which its target is predicted from; -1: the anchor."""
    return self.opening + used_X + self.closing - 1

  def chosen(self, used_X):
    """chosen_Xn: the tokens that were a choice of the policy, a STOP that was drawn included.

    All of them where the end is learned: every length is scored.
    """
    end_X = jnp.full_like(used_X, self.length) if self.learns_end else used_X + self.may_stop
    return jnp.arange(self.length) < end_X[..., None]

  @property
  def serial(self) -> bool:
    """Whether a rollout makes think tokens one after another: each, or the end of a thought, needs the state before."""
    return bool(self.length and not self.iterations and (self.kind_of.serial or self.may_end))

  @property
  def rescored(self) -> bool:
    """Whether think tokens are drawn without gradients, and scored then."""
    return bool(self.length and self.kind_of.policy and self.rescore)

  @property
  def chained(self) -> bool:
    """Whether gradients flow from each think token into the one before, down to the first, in every thought."""
    drawn = self.kind_of.policy and (self.rescore or self.kind_of.discrete)
    return bool(self.serial and not drawn and not self.may_end)

  @property
  def kind_of(self):
    """The entry of KINDS."""
    return KINDS[self.kind]
