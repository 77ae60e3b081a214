"""The config section of a thought: the four questions, and which answers cannot be combined."""

import dataclasses

from thinking_lm.config import option
from thinking_lm.thoughts.halting import HALTING
from thinking_lm.thoughts.placement import PLACEMENTS
from thinking_lm.thoughts.tokens import KINDS
from thinking_lm.thoughts.topology import ROTARY, TOPOLOGIES


@dataclasses.dataclass(frozen=True)
class ThoughtConfig:
  """WHERE thoughts go, WHICH keys they see, WHAT they are and WHEN they end. length = 0 is the plain decoder."""

  placement: str = option("every", "WHERE: which real tokens are followed by a thought", choices=PLACEMENTS)
  stride: int = option(8, "placement=stride: think after every so many tokens of a document", low=1)
  positions: tuple[int, ...] = option((), "placement=explicit: think after these positions of each document", low=0)
  cap: int = option(0, "most thoughts in a row, the first ones; 0 means as many as fit (sentence needs a cap)", low=0)
  topology: str = option("persistent", "WHICH: who sees a thought", choices=TOPOLOGIES)
  rotary: str = option("anchor", "rotary positions: thoughts advance them, or share their anchor's", choices=ROTARY)
  kind: str = option("latent", "WHAT: the kind of a think token", choices=KINDS)
  length: int = option(0, "n think tokens in a thought, START and STOP not counted; 0 is the plain decoder", low=0)
  delimiters: bool = option(False, "put the START and STOP rows around the think tokens")
  temperature: float = option(1.0, "of soft, gumbel and sampled tokens; sampled at 0 is the most likely token", low=0)
  top_k: int = option(0, "soft: keep only the k most likely tokens and renormalise; 0 keeps all", low=0)
  halting: str = option("fixed", "WHEN: fixed length, or where the thought draws STOP", choices=HALTING)
  samples: int = option(1, "G thoughts drawn per anchor (private) or streams per row (persistent)", low=1)
  lookahead: int = option(1, "m real tokens that make a thought's outcome; 0 is the rest of the document", low=0)
  rescore: bool = option(
    True, "sampled: draw without gradients, then score all in one parallel pass; false differentiates the drawing scan"
  )

  def faults(self) -> list[str]:
    """Combinations that mean nothing, each with its reason."""
    found = []
    kind = KINDS.get(self.kind)
    if self.length and kind and not kind.stochastic and self.samples > 1:
      found.append(f"samples {self.samples} of kind {self.kind!r} would all be equal: it draws nothing; use samples 1")
    if self.length and kind and kind.policy and not self.temperature and self.samples > 1:
      found.append(f"samples {self.samples} at temperature 0 would all be equal; use samples 1")
    if self.top_k and self.kind != "soft":
      found.append(f"top_k is read by kind 'soft' only, got kind {self.kind!r}")
    if self.topology == "private" and self.lookahead == 0:
      found.append(
        "lookahead 0 (the rest of the document) needs topology 'persistent': a private thought is seen by "
        "its own look-ahead only; give a number of tokens"
      )
    if self.kind in ("soft", "gumbel") and self.temperature == 0:
      found.append(f"kind {self.kind!r} needs a temperature above 0; a very small one is nearly hard")
    if 0 < self.temperature < 1e-3:
      found.append(f"temperature {self.temperature} is neither 0 (the most likely token) nor at least 0.001")
    if self.placement == "explicit" and not self.positions:
      found.append("placement 'explicit' needs positions, such as (3, 7)")
    if self.length and self.placement == "sentence" and not self.cap:
      found.append("placement 'sentence' needs a cap: shapes are static, and every token could end a sentence")
    if self.length and kind and self.halting in HALTING and HALTING[self.halting].draws and not kind.policy:
      found.append(f"halting {self.halting!r} needs kind 'sampled', which can draw STOP; got {self.kind!r}")
    if self.length and self.placement == "none":
      found.append("placement 'none' never thinks; set length 0 or another placement")
    return found

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

  def used(self, tokens_Xn, stop: int):
    """used_X, the think tokens of each thought before its end; `stop` is the STOP row."""
    return HALTING[self.halting].used(tokens_Xn, stop)

  def last(self, used_X):
    """The last slot of a thought that uses so many think tokens: the one that its target is predicted from."""
    return self.opening + used_X + self.closing - 1

  @property
  def kind_of(self):
    """The entry of KINDS."""
    return KINDS[self.kind]
