"""What a thought is paid: pure functions of the outcome log p(y | x, z), in nats where not said otherwise.

A reward gives reward_BGN from outcome_BGN; no gradient flows through it.
"""


def log_prob(outcome_BGN):
  """log p(y | x, z): what perplexity pays for. Nats, <= 0. Its expectation is J."""
  return outcome_BGN


REWARDS = dict(log_prob=log_prob)
