"""Reliability diagrams: how often what was said to be likely came, bin by bin, against how likely it was said to be."""

import io
from collections.abc import Mapping
from typing import Any

MISSING = "no reliability diagram: matplotlib is not installed; pip install 'thinking_lm[report]' brings it"


def reliability(values: Mapping[str, Any], title: str) -> bytes | None:
  """A PNG of `calibration.summarise`'s values, one column for each forecaster; None where matplotlib is not installed.

  Above: accuracy of the forecasts of each bin at their mean; on the diagonal what is said is true. Below: how many
  forecasts each bin has.
  """
  try:
    from matplotlib.figure import Figure
  except ImportError:
    return None
  forecasters, bins = values["forecasters"], values["bins"]
  figure = Figure(figsize=(4.2 * len(forecasters), 5.2), layout="constrained")
  axes = figure.subplots(2, len(forecasters), squeeze=False, sharex=True, height_ratios=(3, 1))
  figure.suptitle(title, fontsize=9)
  for column, (name, found) in enumerate(forecasters.items()):
    above, below = axes[:, column]
    there = [k for k, count in enumerate(found["bins"]["count"]) if count]
    said, came = ([found["bins"][part][k] for k in there] for part in ("forecast", "accuracy"))
    above.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle="--")
    above.vlines(said, said, came, color="tab:red", linewidth=2, alpha=0.6)
    above.plot(said, came, color="tab:blue", marker="o", markersize=4)
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="came true")
    above.set_title(f"{name}: ECE {found['ece'][0]:.3f}, Brier {found['brier'][0]:.3f}", fontsize=10)
    below.bar([(k + 0.5) / bins for k in there], [found["bins"]["count"][k] for k in there], width=0.9 / bins)
    below.set(xlabel="forecast", ylabel="forecasts")
  data = io.BytesIO()
  figure.savefig(data, format="png", dpi=120)
  return data.getvalue()
