"""The same work done by Hugging Face's transformers on PyTorch, for the suites to be measured against.

Neither is a dependency: where they are not installed (`pip install torch transformers`) the suites leave them out.
Versions that ran: torch 2.13, transformers 5.24.
"""

import functools
import importlib.util
from collections.abc import Callable

import numpy as np


def installed() -> bool:
  """Whether there are peers to measure."""
  return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


@functools.cache
def llama(V: int):
  """A Llama of the sizes of `bench_problem.model`, with PyTorch's own attention, on one thread."""
  import torch
  import transformers

  torch.set_num_threads(1)
  torch.manual_seed(0)
  sizes = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4)
  config = transformers.LlamaConfig(
    vocab_size=V, **sizes, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None
  )
  return transformers.LlamaForCausalLM(config)


def train_step(V: int, B: int, T: int) -> Callable[[], float]:
  """A function that makes one step, with AdamW and clipping, in float32: the loss."""
  import torch

  model = llama(V)
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
  tokens = torch.from_numpy(np.random.default_rng(0).integers(V, size=(B, T)))

  def step():
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()

  return step


def thoughts(V: int, B: int, T: int, n: int) -> Callable[[], np.ndarray]:
  """A function that draws n tokens after each of the T prefixes of B rows, every prefix a row padded on the left."""
  import torch

  model = llama(V).train(False)
  tokens = np.random.default_rng(0).integers(V, size=(B, T))
  rows = np.zeros((B * T, T), np.int64)
  for b in range(B):
    for t in range(T):
      rows[b * T + t, T - 1 - t :] = tokens[b, : t + 1]
  mask = np.arange(T) >= T - 1 - np.tile(np.arange(T), B)[:, None]
  prompts, mask = torch.from_numpy(rows), torch.from_numpy(mask.astype(np.int64))
  sampling = dict(do_sample=True, top_k=0, max_new_tokens=n, min_new_tokens=n, pad_token_id=0)

  def draw():
    with torch.inference_mode():
      return model.generate(input_ids=prompts, attention_mask=mask, **sampling)[:, T:].numpy()

  return draw


def quiet_star(V: int, B: int, T: int, n: int) -> Callable[[], float]:
  """A function that takes the gradient of Quiet-STaR's objective the way its authors' code does: the loss.

  Typed from what that code computes (modeling_mistral.py of ezelikman/quiet-star), on the model above. Each of n + 1
  passes of T queries sees the keys of all passes before under a dense mask. Its states go through the head twice:
  mixed with those of the base pass for a cross-entropy, and as they are for the next token, which is drawn as one-hot
  rows by `gumbel_softmax` and looked up by a product with the embedding. Losses are the first pass's, the last one's
  and REINFORCE on what the last gains over the first. It is kinder than that code in drawing one thought, without
  delimiters or look-ahead, and in paying once and not at every pass.
  """
  import torch
  import transformers
  from torch.nn import functional

  model = llama(V).train(True)
  mix = _weigher(model.config.hidden_size)
  tokens = torch.from_numpy(np.random.default_rng(0).integers(V, size=(B, T)))
  targets = tokens.roll(-1, dims=1)
  never = torch.finfo(torch.float32).min
  causal = torch.triu(torch.full((T, T), never), diagonal=1)
  own = torch.full((T, T), never).fill_diagonal_(0.0)
  loss_of = lambda logits: functional.cross_entropy(logits.reshape(-1, V), targets.reshape(-1), reduction="none")

  def step():
    cache, mask, places = transformers.DynamicCache(config=model.config), causal, torch.arange(T)
    inputs, log_pi, first, losses = model.model.embed_tokens(tokens), 0.0, None, []
    for number in range(n + 1):
      shown = mask.expand(B, 1, T, -1)
      hidden = model.model(
        inputs_embeds=inputs, attention_mask=shown, position_ids=places[None], cache=cache, use_cache=True
      )[0]
      if number:
        weight = mix(torch.cat([first, hidden], dim=-1))
        losses.append(loss_of(model.lm_head(first * (1 - weight) + hidden * weight)))
      else:
        first = hidden
        losses.append(loss_of(model.lm_head(hidden)))
      if number == n:
        break
      logits = model.lm_head(hidden).view(-1, V)
      rows = functional.gumbel_softmax(logits, hard=True).detach()
      log_pi = log_pi + functional.log_softmax(logits, dim=-1).gather(1, rows.argmax(dim=-1, keepdim=True))[:, 0]
      inputs = (rows @ model.model.embed_tokens.weight).view(B, T, -1)
      mask, places = torch.cat([mask, own], dim=1), places + 1
    gain = (losses[0] - losses[-1]).detach()
    loss = torch.sum(losses[0] + losses[-1] - gain * log_pi)
    loss.backward()
    for module in (model, mix):
      module.zero_grad()
    return loss.item()

  return step


def _weigher(width: int):
  """The head that weighs the base pass against a thought: three layers, as in the paper."""
  from torch import nn

  return nn.Sequential(
    *(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
  )
