"""The same work done by Hugging Face's transformers on PyTorch, for the suites to be measured against.

Neither is a dependency: where they are not installed (`pip install torch transformers`) the suites leave them out.
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
