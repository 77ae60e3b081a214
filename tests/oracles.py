"""An oracle too dumb to be wrong: what thinking means, written from its definitions and not from the code.

There is no cache, no scan and no batch: one row, one sample, an explicit list of slots, an explicit full mask, and the
whole model again for every think token. A private thought is a sequence of its own: its prefix, itself, its look-ahead.
Everything is float64 if the caller says `jax.enable_x64(True)`, and differentiable with jax.

Only the parameter dictionary and the config sections are taken from the package.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SLOTS = 40
"""Every sequence is filled up to so many slots, so that one compilation serves all. The filling sees itself only."""


class Slot(NamedTuple):
  """what: "real", "start", "think" or "stop". token: of a real slot. document, position: of any slot."""

  what: str
  token: int
  document: int
  position: int


class Row(NamedTuple):
  """A row of a batch as plain lists, and where it thinks."""

  tokens: list
  targets: list
  weights: list
  segments: list
  positions: list
  anchors: list


def wide(params):
  """The parameters in float64; call it inside `jax.enable_x64(True)`."""
  return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)


def rms_norm(x_XD, scale_D):
  return x_XD / jnp.sqrt((x_XD**2).mean(axis=-1, keepdims=True) + 1e-6) * scale_D


def rope(x_SE, positions_S, base):
  """Turns the pair (i, i + E/2) of slot s by the angle position_s / base^(2 i / E)."""
  half = x_SE.shape[1] // 2
  columns = [None] * (2 * half)
  for i in range(half):
    angle_S = positions_S / base ** (2 * i / x_SE.shape[1])
    columns[i] = x_SE[:, i] * jnp.cos(angle_S) - x_SE[:, i + half] * jnp.sin(angle_S)
    columns[i + half] = x_SE[:, i] * jnp.sin(angle_S) + x_SE[:, i + half] * jnp.cos(angle_S)
  return jnp.stack(columns, axis=1)


@functools.partial(jax.jit, static_argnums=1)
def decode(params, config, x_SD, positions_S, sees_SS):
  """Hidden states after the final norm of one sequence under an explicit mask."""
  E = config.head_width or config.width // config.heads
  for number in range(config.layers):
    layer = jax.tree.map(lambda leaf, number=number: leaf[number], params["layers"])
    h_SD = rms_norm(x_SD, layer["attention_norm"]["scale"])
    mixed = []
    for head in range(config.heads):
      group = head // (config.heads // config.kv_heads)
      q_SE = (h_SD @ layer["query"])[:, head * E : (head + 1) * E]
      k_SE = (h_SD @ layer["key"])[:, group * E : (group + 1) * E]
      v_SE = (h_SD @ layer["value"])[:, group * E : (group + 1) * E]
      if config.qk_norm:
        q_SE, k_SE = rms_norm(q_SE, layer["query_norm"]["scale"]), rms_norm(k_SE, layer["key_norm"]["scale"])
      q_SE, k_SE = rope(q_SE, positions_S, config.rope_base), rope(k_SE, positions_S, config.rope_base)
      weight_SS = jnp.exp(jnp.where(sees_SS, q_SE @ k_SE.T / math.sqrt(E), -jnp.inf))
      mixed.append(weight_SS / weight_SS.sum(axis=1, keepdims=True) @ v_SE)
    x_SD = x_SD + jnp.concatenate(mixed, axis=1) @ layer["out"]
    h_SD = rms_norm(x_SD, layer["mlp_norm"]["scale"])
    gate_SF = h_SD @ layer["gate"]
    x_SD = x_SD + (gate_SF / (1 + jnp.exp(-gate_SF)) * (h_SD @ layer["up"])) @ layer["down"]
  return rms_norm(x_SD, params["final_norm"]["scale"])


@functools.partial(jax.jit, static_argnums=(1, 2))
def logits(params, config, V, hidden_D):
  """Of the V real tokens only: control rows are never predicted."""
  head_DV = params["embedding"].T if config.tie_embeddings else params["head"]
  z_V = (hidden_D @ head_DV)[:V]
  return config.logit_cap * jnp.tanh(z_V / config.logit_cap) if config.logit_cap else z_V


@jax.jit
def log_softmax(z_V):
  return z_V - jnp.log(jnp.exp(z_V).sum())


def embedding(params, config, row):
  return params["embedding"][row] * math.sqrt(config.width)


def mean_embedding(params, config, weight_V):
  return weight_V @ params["embedding"][: len(weight_V)] * math.sqrt(config.width)


def think_token(params, config, thought, V, hidden_D, token, noise_V):
  """(input, id) of a think token after a hidden state. token: the drawn one. noise_V: the drawn noise (D numbers for
  `noisy`).
  """
  if thought.kind == "pause":
    return embedding(params, config, V + 2), -1
  if thought.kind == "latent":
    return (hidden_D @ params["latent"] if config.latent_map == "linear" else hidden_D), -1
  if thought.kind == "sampled":
    return embedding(params, config, token), token
  z_V = logits(params, config, V, hidden_D)
  if thought.kind in ("soft", "noisy"):
    best = np.argsort(-np.asarray(jax.lax.stop_gradient(z_V)))
    kept_V = np.isin(np.arange(V), best[: thought.top_k or V])
    weight_V = jnp.where(kept_V, jnp.exp(z_V / thought.temperature), 0.0)
    mean_D = mean_embedding(params, config, weight_V / weight_V.sum())
    if thought.kind == "soft":
      return mean_D, best[0]
    x_D = mean_D + thought.noise * noise_V
    return (jax.lax.stop_gradient(x_D) if thought.rescore else x_D), best[0]
  assert thought.kind == "gumbel"
  perturbed_V = z_V + noise_V
  relaxed_V = jnp.exp(log_softmax(perturbed_V / thought.temperature))
  hard = int(jnp.argmax(jax.lax.stop_gradient(perturbed_V)))
  # Hard forward, relaxed backward.
  weight_V = jnp.zeros(V).at[hard].set(1.0) + relaxed_V - jax.lax.stop_gradient(relaxed_V)
  return mean_embedding(params, config, weight_V), hard


def run(params, config, thought, V, slots, drawn, noise):
  """Runs a sequence of slots, in which a slot sees the slots up to its own of its document.

  drawn, noise: the token and the Gumbel noise of each think slot, in order.

  Returns:
    (hidden state of each slot, input of each think slot, id of each think slot).
  """
  assert len(slots) <= SLOTS
  sees_SS = np.eye(SLOTS, dtype=bool)
  positions_S = np.zeros(SLOTS)
  for a, query in enumerate(slots):
    positions_S[a] = query.position
    for b, key in enumerate(slots):
      sees_SS[a, b] = b <= a and query.document == key.document
  rows = [{"real": slot.token, "start": V, "stop": V + 1, "think": 0}[slot.what] for slot in slots]
  x_SD = embedding(params, config, np.array(rows + [0] * (SLOTS - len(slots))))  # think slots are filled one by one
  inputs, tokens, hidden_SD = [], [], None
  for s, slot in enumerate(slots):
    if slot.what == "think":
      if thought.kind in ("latent", "soft", "noisy", "gumbel"):
        hidden_SD = decode(params, config, x_SD, positions_S, sees_SS)  # what is not filled yet is not seen
      step = len(inputs)
      before = None if hidden_SD is None else hidden_SD[s - 1]
      x_D, token = think_token(params, config, thought, V, before, drawn[step], noise[step])
      inputs.append(x_D)
      tokens.append(token)
      x_SD = x_SD.at[s].set(x_D)
  return decode(params, config, x_SD, positions_S, sees_SS), inputs, tokens


def thought_slots(thought, document, anchor_position):
  """The slots of one thought. Their positions go on from the anchor's, or share it."""
  names = ["think"] * thought.length
  if thought.delimiters and thought.length:
    names = ["start", *names, "stop"]
  advance = thought.rotary == "advance"
  return [Slot(name, -1, document, anchor_position + (j + 1) * advance) for j, name in enumerate(names)]


def density(params, config, thought, V, hidden_SD, first, inputs):
  """(log-density of the inputs at slots first, first + 1, ..., mean entropy): Gaussians around soft tokens."""
  soft = dataclasses.replace(thought, kind="soft")
  one = lambda x_D, mean_D: (
    -jnp.sum((x_D - mean_D) ** 2 / (2 * thought.noise**2) + math.log(thought.noise * math.sqrt(2 * math.pi)))
  )
  means = [think_token(params, config, soft, V, hidden_SD[first + j - 1], 0, None)[0] for j in range(len(inputs))]
  total = sum(one(x_D, mean_D) for x_D, mean_D in zip(inputs, means, strict=True))
  return total, config.width * math.log(thought.noise * math.sqrt(2 * math.pi * math.e))


def policy(params, config, thought, V, hidden_SD, first, inputs, tokens):
  """(log pi of what was drawn at slots first, first + 1, ..., mean entropy)."""
  if thought.kind == "noisy":
    return density(params, config, thought, V, hidden_SD, first, inputs)
  if thought.kind != "sampled" or thought.temperature == 0:
    return 0.0, 0.0
  total, entropy = 0.0, 0.0
  for j, token in enumerate(tokens):
    logp_V = log_softmax(logits(params, config, V, hidden_SD[first + j - 1]) / thought.temperature)
    total += logp_V[token]
    entropy += -(jnp.exp(logp_V) * logp_V).sum() / len(tokens)
  return total, entropy


def score(params, config, V, hidden_D, target):
  """(log p(target), the target is the most likely token)."""
  z_V = logits(params, config, V, hidden_D)
  return log_softmax(z_V)[target], int(jnp.argmax(jax.lax.stop_gradient(z_V))) == target


def persistent(params, config, thought, V, row: Row, drawn, noise):
  """One row and one sample with its thoughts in one stream. drawn[n][j], noise[n][j]: of thought n.

  Returns:
    dict of lists: logp, hit [T] (None at padding); outcome, policy, entropy, inputs, tokens [anchors].
  """
  slots, readout, first = [], {}, []
  J = len(thought_slots(thought, 0, 0))
  for t, document in enumerate(row.segments):
    if not document:
      continue
    earlier = sum(a < t and row.segments[a] == document for a in row.anchors)
    position = row.positions[t] + (J * earlier if thought.rotary == "advance" else 0)
    slots.append(Slot("real", row.tokens[t], document, position))
    if t in row.anchors:
      first.append(len(slots) + bool(thought.delimiters))
      slots += thought_slots(thought, document, position)
    readout[t] = len(slots) - 1
  n = thought.length
  flat = lambda nested: [item for one in nested for item in one]
  hidden_SD, inputs, tokens = run(params, config, thought, V, slots, flat(drawn), flat(noise))
  scores = {t: score(params, config, V, hidden_SD[s], row.targets[t]) for t, s in readout.items()}
  out = dict(outcome=[], policy=[], entropy=[], inputs=[], tokens=[])
  for number, anchor in enumerate(row.anchors):
    end = anchor + thought.lookahead if thought.lookahead else len(row.tokens)
    same = [t for t in scores if anchor <= t < end and row.segments[t] == row.segments[anchor]]
    out["outcome"].append(sum(row.weights[t] * scores[t][0] for t in same))
    mine = slice(number * n, (number + 1) * n)
    logp, entropy = policy(params, config, thought, V, hidden_SD, first[number], inputs[mine], tokens[mine])
    for name, value in dict(policy=logp, entropy=entropy, inputs=inputs[mine], tokens=tokens[mine]).items():
      out[name].append(value)
  scores = [scores.get(t, (None, None)) for t in range(len(row.tokens))]
  return out | dict(logp=[logp for logp, _ in scores], hit=[hit for _, hit in scores])


def private(params, config, thought, V, row: Row, drawn, noise):
  """One row and one sample, each thought in a sequence of its own.

  Returns:
    as `persistent`, and base [T], ahead [anchors][lookahead - 1] (None where it leaves the document).
  """
  plain = thought.__class__(length=0, placement=thought.placement)
  base = persistent(params, config, plain, V, row._replace(anchors=[]), [], [])
  out = dict(logp=list(base["logp"]), hit=list(base["hit"]), base=base["logp"])
  out |= dict(outcome=[], policy=[], entropy=[], inputs=[], tokens=[], ahead=[])
  for number, anchor in enumerate(row.anchors):
    document = row.segments[anchor]
    inside = lambda t, document=document: t < len(row.tokens) and row.segments[t] == document
    slots = [Slot("real", row.tokens[t], 1, row.positions[t]) for t in range(anchor + 1) if inside(t)]
    first = len(slots) + bool(thought.delimiters)
    slots += thought_slots(thought, 1, row.positions[anchor])
    last = len(slots) - 1
    moved = last + 1 - len([t for t in range(anchor + 1) if inside(t)]) if thought.rotary == "advance" else 0
    for t in range(anchor + 1, anchor + thought.lookahead):
      if inside(t):
        slots.append(Slot("real", row.tokens[t], 1, row.positions[t] + moved))
    hidden_SD, inputs, tokens = run(params, config, thought, V, slots, drawn[number], noise[number])
    outcome, ahead = 0.0, []
    for m in range(thought.lookahead):
      if not inside(anchor + m):
        ahead.append(None)
        continue
      logp, hit = score(params, config, V, hidden_SD[last + m], row.targets[anchor + m])
      outcome += row.weights[anchor + m] * logp
      ahead.append(logp)
      if m == 0:
        out["logp"][anchor], out["hit"][anchor] = logp, hit
    logp, entropy = policy(params, config, thought, V, hidden_SD, first, inputs, tokens)
    found = dict(outcome=outcome, policy=logp, entropy=entropy, inputs=inputs, tokens=tokens, ahead=ahead[1:])
    for name, value in found.items():
      out[name].append(value)
  return out


def drawn_noise(draw, key, ids, samples, anchors, length, rows, V):
  """noise[b][g][n][j]: what the rollout draws: its key folds in the example, the sample, the anchor, the step.

  draw: jax.random.gumbel or normal. rows: how many numbers are drawn, of which the first V are kept.
  """
  one = jax.jit(lambda numbers: draw(functools.reduce(jax.random.fold_in, numbers, key), (rows,), jnp.float32))
  return [
    [[[np.asarray(one((i, g, a, j)))[:V] for j in range(length)] for a in row] for g in range(samples)]
    for i, row in zip(np.asarray(ids), anchors, strict=True)
  ]
