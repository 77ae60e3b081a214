"""What parallel iterations of a thought do to the gradient."""

import dataclasses

from thinking_lm.analysis import microscope, training
from thinking_lm.types import Carried


def iterated(subject, params, batch, step: int, key) -> dict | None:
  """The gradient by parallel iterations against that through the serial chain; None for thoughts without the former.

  The passes are those of `model/jacobi.py`, which names their source.

  Args:
    subject: an Experiment. params: its parameters. batch: rows, on the device. step: number of finished steps. key:
      what is drawn in either gradient.

  Returns:
    JSON values: the residual of the passes (`jacobi`), FLOPs over those of the serial gradient, and for each part of
    the parameters the relative gap |g - g'| / |g'| and the cosine.
  """
  thought, data = subject.config.thought, subject.data
  if not thought.iterations:
    return None

  def moments(**changes):
    changed = subject.with_sections(thought=dataclasses.replace(thought, **changes))
    config, loss_fn = changed.config, changed.loss_fn
    cost = training.training_flops(config, data.vocabulary.size, data.sequence_length) / config.train.batch_size
    loss = lambda params, batch, key: loss_fn(params, batch, key, Carried(step=step))
    one = microscope.Estimator(loss, cost * len(batch.tokens_BT), draws=False)
    return microscope.moments(one, params, batch, key, 1), one.flops

  serial, serial_flops = moments(iterations=0, through=0)
  found, cost = moments()
  parts = microscope.compare(found, microscope.exact(serial, "serial"), cost)
  return dict(
    iterations=thought.iterations,
    through=thought.through or thought.iterations,
    residual=found.told["residual"],
    flops=cost / serial_flops,
    against={part: dict(gap=one["bias"], cosine=one["cosine"]) for part, one in parts.items()},
  )
