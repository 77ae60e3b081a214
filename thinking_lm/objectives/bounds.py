"""Which expectation over thoughts is maximised: the pathwise (NLL) part of each bound on log E_z p(y | x, z).

A bound gives a value for each target from logp_BG..., with G on axis 1.
"""


def J(logp_BGX):
  """J = E_z log p(y | x, z) <= log E_z p(y | x, z), by the mean over samples (Jensen)."""
  return logp_BGX.mean(axis=1)


BOUNDS = dict(J=J)
