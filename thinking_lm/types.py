"""The glossary, and the few structures that travel between the parts.

Axis letters (a name ends in its axes: `logp_BGT`):
  B rows of a batch            T real tokens of a row         N anchors of a row (places where it thinks)
  G samples of a thought       J think slots of one thought   M look-ahead tokens after a thought
  S slots of the interleaved stream (real and think)          V vocabulary         D model width
  H query heads                K key-value heads              E width of a head    F width of the MLP    L layers
  Q queries of one call        C real tokens of a block       R blocks of a row    P streams of one call (own keys each)
  I pairs of a report          Z classes of a reported distribution: the named tokens, then all others together
  P also: codes of an answer   W codes of a token: its bytes, or one that stands for it

Terms:
  anchor      a real token after which the model thinks, before it predicts that token's target
  thought     what is emitted at one anchor: J think slots, that is n think tokens and, with delimiters, START and STOP
  placement   WHERE thoughts go: batch -> Layout
  need        entropy of the next token, nats, by a pass without thoughts: of the model itself or of a frozen proxy
  topology    WHICH keys a slot sees: `persistent` (thoughts stay in context) or `private` (only the thought itself and
              its look-ahead see it)
  kind        WHAT a think token is: pause, latent, soft, noisy, gumbel, sampled
  halting     WHEN a thought ends
  rollout     the one place that runs the model over real and think slots; gives a Trace
  trace       what a rollout leaves for an objective: log-probabilities, never the model
  exit        a length at which a thought can end; K of them, where a head learns which one
  outcome     log p(y | x, z): the summed log-probability of the look-ahead targets of one thought
  unit        what a joint bound (M, P) is over: the outcome of a private thought, or of all of a document's thoughts
  answer      m tokens that are drawn behind a thought in place of the real ones, and that no real token ever sees
  report      what a thought says its prediction is: pairs of a candidate token and a confidence, drawn as it is
  teacher     a moving average of the parameters; reference: a copy that stays as it is
  advantage   the reward of a thought minus its baseline; it multiplies grad log pi(z | x)

Units: nats for log-probabilities, bits per byte where said, FLOPs (a multiply-add is two), seconds.
"""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
from flax import struct

Params = Any
"""A nested dict of float32 arrays: what `Decoder.init` gives and every gradient has the shape of."""


@struct.dataclass
class Batch:
  """Rows of real tokens. On the host these are numpy arrays, on the device jax arrays.

  tokens_BT: int32 inputs in [0, vocabulary.size).
  targets_BT: int32, what position t must predict: usually the next token, for a tagging task the label at t.
  weights_BT: float32, weight of that prediction in every loss and metric (0 where there is nothing to predict).
  segments_BT: int32 document number within the row, from 1; 0 is padding. Attention never crosses documents.
  positions_BT: int32 position within the document, or within its piece where a row cuts it, from 0.
  need_BT: float32, how much a placement by need wants a thought after each token; None where nobody asked.
  ids_B: uint32 global example index (step * global_batch + row): random keys derive from it, so that the numbers do
    not depend on how rows are spread over micro-batches, devices or hosts.
  """

  tokens_BT: jax.Array
  targets_BT: jax.Array
  weights_BT: jax.Array
  segments_BT: jax.Array
  positions_BT: jax.Array
  ids_B: jax.Array
  need_BT: jax.Array | None = None


@struct.dataclass
class Carried:
  """What a loss is told besides parameters, rows and key: what earlier steps and updates left; without gradient.

  step: int32 number of finished steps, for schedules.
  extra: statistics and copies of parameters that the objective carries from step to step, by name.
  drawn: what was drawn before the first of several updates on the same rows, every array with the rows B first; None
    where each update draws for itself.
  """

  step: jax.Array = np.int32(0)
  extra: dict[str, Any] = struct.field(default_factory=dict)
  drawn: Any = None


BORDER = 256
"""The code of a document border, in Vocabulary.spelling_VW: the first that is no byte."""


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
  """What the model and the placements must know of a tokenizer.

  size: number of real token ids.
  document: the id that starts every document, and that is the target of a document's last token.
  bytes_V: int32 bytes that each token stands for (0 for `document`), for bits per byte.
  sentence_V: int8 class of each token: 0 other, 1 ends in sentence punctuation, 2 is white space, 3 ends a sentence
    on its own. A sentence ends at a token of class 3, or of class 2 right after one of class 1: a causal rule, so that
    where a model thinks never tells it what comes next.
  spelling_VW: int32 codes of each token, -1 behind its last: its bytes, and BORDER for `document`. None: tokens have no
    parts.
  """

  size: int
  document: int
  bytes_V: np.ndarray
  sentence_V: np.ndarray
  spelling_VW: np.ndarray | None = None


@struct.dataclass
class Layout:
  """Where each row thinks. Static shapes: a row with fewer than N anchors is filled up with invalid ones.

  anchors_BN: int32 index into T of the anchor, ascending over the valid ones; T where invalid.
  block: C, real tokens of a block at most (static). A persistent stream is R blocks of C real slots, then J think
    slots; a block ends at an anchor or when it is full.
  blocks: R, enough for every row that the placement can mark (static).
  dropped_B: int32 marked tokens that found no room among the N anchors; None where that cannot happen.
  cuts: where all rows hold one document and think at the same positions: the index into T after each anchor (static).
    Blocks then end there and nowhere else, block and blocks say nothing, and no think slots follow the last cut.
  """

  anchors_BN: jax.Array
  block: int = struct.field(pytree_node=False)
  blocks: int = struct.field(pytree_node=False)
  dropped_B: jax.Array | None = None
  cuts: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)

  def sizes(self, T: int) -> tuple[tuple[int, ...], int]:
    """(real slots of each block that think slots follow, real slots after the last of these)."""
    if self.cuts is None:
      return (self.block,) * self.blocks, 0
    ends = (0, *self.cuts)
    return tuple(end - start for start, end in itertools.pairwise(ends)), T - ends[-1]


@struct.dataclass
class Thoughts:
  """The think tokens of a rollout: enough to put the same thoughts (or others) back in.

  inputs_BGNJD: embeddings that were fed at the think tokens (delimiters excluded).
  tokens_BGNJ: int32 ids for `sampled` and `gumbel`, the most likely id for `soft` and `noisy`, -1 for `latent` and
    `pause`.
  used_BGN: int32 think tokens before the end; None: all, or those before the first STOP where that may be drawn.
  answer_BGNA: int32 real tokens (A = m here) that were drawn behind the thought; None without an answer.
  """

  inputs_BGNJD: jax.Array
  tokens_BGNJ: jax.Array
  used_BGN: jax.Array | None = None
  answer_BGNA: jax.Array | None = None


@struct.dataclass
class Answer:
  """What thoughts answer and what was asked for, in codes (Vocabulary.spelling_VW), -1 behind the end.

  said_BGNP: the answer up to its first border, border included.
  came_BNP: the targets from the anchor on, as far as its document goes; one code more than an answer can have.
  ends_BNP: how many codes of `came` there are up to the end of each target (of the last one again, from there on).
  asked_BNP: what a task asks for there: all that came, or of a tagging task the anchor's target.
  weight_BN: the weight of the anchor's target, 0 where the anchor is invalid.
  """

  said_BGNP: jax.Array
  came_BNP: jax.Array
  ends_BNP: jax.Array
  asked_BNP: jax.Array
  weight_BN: jax.Array


@struct.dataclass
class Report:
  """What thoughts say of the target of their anchor, as it was said: `objectives.scores` makes a distribution of it.

  candidates_BGNI: int32 real tokens that are named, in order. confidences_BGNI: float32 in [0, 1].
  actual_BGNI: the probability that the model itself gives each candidate after the thought, without gradient.
  target_BN: int32 what came. weight_BN: the weight of that target, 0 where the anchor is invalid. anchors_BN: its index
    into T.
  vocabulary: number of real tokens (static).
  """

  candidates_BGNI: jax.Array
  confidences_BGNI: jax.Array
  actual_BGNI: jax.Array
  target_BN: jax.Array
  weight_BN: jax.Array
  anchors_BN: jax.Array
  vocabulary: int = struct.field(pytree_node=False)


@struct.dataclass
class Surrogate:
  """RELAX's control variate c of drawn tokens, which a head learns (`objectives/variates.py`).

  value_BGN: c of the relaxed copy, differentiable in the policy only. learned_BGN: the same numbers, differentiable in
  the head only. slope_BGNV: the gradient of c with respect to the policy's logits, differentiable in the head only.
  score_BGNV: that of log pi of the token, without gradient.
  """

  value_BGN: jax.Array
  learned_BGN: jax.Array
  slope_BGNV: jax.Array
  score_BGNV: jax.Array


@struct.dataclass
class Trace:
  """What a rollout leaves for an objective. Log-probabilities are in nats and differentiable.

  logp_BGT: log p(target_t | real tokens <= t and the thoughts that t may see).
  hit_BGT: bool, the target is the most likely real token.
  weights_BT: the batch's weights.
  base_logp_BT: the same without any thought, where the topology computes it anyway (`private`); else None.
  ahead_logp_BGNA, ahead_weights_BNA: predictions that only exist because a private thought looks further ahead than
    one token (A = M - 1, the targets of anchor + 1 ... anchor + M - 1); None otherwise.
  outcome_BGN: log p(y | x, z) of each thought, weighted by the targets' weights; 0 where invalid.
  policy_logp_BGN: log pi(z | x) summed over the sampled think tokens (a density for `noisy`) and those of the answer; 0
    for kinds without a policy, and where invalid.
  entropy_BGN: entropy of the thought's token distributions, mean over its tokens, in nats; 0 as above.
  valid_BN: bool, the anchor exists.
  used_BGN: int32 think tokens used (delimiters excluded).
  thoughts: the thoughts themselves, without gradient.
  unit_BN: int32 index into N of the thought whose outcome holds all that this thought can change: itself where private,
    the first thought of its document where persistent (there only if an outcome is the rest of the document). The
    outcomes of units are disjoint.
  free_BT: the batch's weights of the targets that no thought comes before, 0 at the others: their log-probability is
    the same in every sample, and together with the units' targets they are all targets.
  unit_BT: int32 index into N of the unit whose outcome holds the target; N for targets that no thought comes before.
  relaxed_BGN: where thought.relaxation asks for it, the outcome of the relaxed thought: a control variate (see
    `thoughts.relaxed`), differentiable in the policy only. surrogate: in its place, what a head learned to say.
  base_outcome_BN: the outcome without any thought, where known (`private`); else None.
  outcome_hit_BGN: bool, every weighted target of the outcome is the most likely real token.
  dropped_B: of the layout.
  exit_logp_BGNK, exit_outcome_BGNK, exit_length_K: where a head decides when a thought ends: log-probability of each of
    the K exits, the outcome there, and its think tokens; None otherwise. logp_BGT, hit_BGT and used_BGN are then those
    of the one exit that decoding takes, policy_logp_BGN is that of all n think tokens.
  mix_BGN: weight of the prediction after the thought, at its anchor; None where nothing is mixed.
  top_logp_BGT: log-probability of the most likely real token at each target.
  answer: what they answer, for thoughts that do, once somebody who knows the vocabulary has spelled it; else None.
  report: what the thoughts report, for thoughts that do; else None. score_BGN: how good that was, once it is
    judged, times the weight of the target.
  chosen_BGNJ, token_logp_BGNJ: bool, the think tokens (J = n here) that were a choice of the policy, a drawn STOP too;
    and log pi of each, the terms of policy_logp_BGN, 0 at the others. Those of the answer come behind them (J = n + m).
    None for kinds without a policy.
  value_BGN: the reward that the value head expects of the thought, from its anchor's hidden state, through which no
    gradient flows; None without that head.
  residual_BGN: of thoughts made by parallel iterations, how much their think tokens would change in one more, relative
    to their norm; None for others.
  """

  logp_BGT: jax.Array
  hit_BGT: jax.Array
  weights_BT: jax.Array
  base_logp_BT: jax.Array | None
  ahead_logp_BGNA: jax.Array | None
  ahead_weights_BNA: jax.Array | None
  outcome_BGN: jax.Array
  policy_logp_BGN: jax.Array
  entropy_BGN: jax.Array
  valid_BN: jax.Array
  used_BGN: jax.Array
  thoughts: Thoughts
  unit_BN: jax.Array | None = None
  free_BT: jax.Array | None = None
  unit_BT: jax.Array | None = None
  relaxed_BGN: jax.Array | None = None
  surrogate: Surrogate | None = None
  base_outcome_BN: jax.Array | None = None
  outcome_hit_BGN: jax.Array | None = None
  exit_logp_BGNK: jax.Array | None = None
  exit_outcome_BGNK: jax.Array | None = None
  exit_length_K: jax.Array | None = None
  mix_BGN: jax.Array | None = None
  dropped_B: jax.Array | None = None
  top_logp_BGT: jax.Array | None = None
  answer: Answer | None = None
  report: Report | None = None
  score_BGN: jax.Array | None = None
  token_logp_BGNJ: jax.Array | None = None
  chosen_BGNJ: jax.Array | None = None
  value_BGN: jax.Array | None = None
  residual_BGN: jax.Array | None = None


@struct.dataclass
class Beside:
  """What other passes over the same rows tell an objective, without gradient; None where it does not ask.

  drawn_logp_BGNJ: Trace.token_logp_BGNJ under the parameters that drew the thoughts, where later ones score them.
  reference_logp_BGNJ: the same under the reference.
  plain_logp_BT, plain_outcome_BN: log p(target) and the outcomes without thoughts, by a teacher or the same model.
  greedy_reward_BN: what the same model's greedy thoughts are paid.
  """

  drawn_logp_BGNJ: jax.Array | None = None
  reference_logp_BGNJ: jax.Array | None = None
  plain_logp_BT: jax.Array | None = None
  plain_outcome_BN: jax.Array | None = None
  greedy_reward_BN: jax.Array | None = None
