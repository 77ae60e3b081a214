"""What the bench measures of others does the work that it is measured for; needs PyTorch and transformers."""

import numpy as np
import pytest

from thinking_lm.analysis import peers


@pytest.mark.skipif(not peers.installed(), reason="needs torch and transformers")
def test_passes_of_quiet_star_see_a_prefix_and_its_own_thought(monkeypatch):
  """States that the policy reads, against the plain model on each prefix with the thought drawn there."""
  import torch
  from torch.nn import functional

  V, B, T, n = 50, 2, 12, 3
  model, drawn, states, gumbel_softmax = peers.llama(V), [], [], functional.gumbel_softmax

  def spy(*arguments, **options):
    drawn.append(gumbel_softmax(*arguments, **options))
    return drawn[-1]

  monkeypatch.setattr(functional, "gumbel_softmax", spy)
  hook = model.lm_head.register_forward_hook(lambda _, inputs, output: states.append(inputs[0].detach()))
  loss = peers.quiet_star(V, B, T, n)()
  hook.remove()
  assert np.isfinite(loss) and len(states) == 2 * n + 1, "two heads a pass, and the last thought's prediction"
  thoughts = [rows.argmax(dim=-1).view(B, T) for rows in drawn]
  tokens = torch.from_numpy(np.random.default_rng(0).integers(V, size=(B, T)))
  for j in range(1, n):
    for b, t in np.ndindex(B, T):
      read = torch.cat([tokens[b, : t + 1], *[thought[b, t : t + 1] for thought in thoughts[:j]]])
      with torch.no_grad():
        expected = model.model(input_ids=read[None])[0][0, -1]
      torch.testing.assert_close(states[1 + 2 * j][b, t], expected, rtol=1e-4, atol=1e-5)
