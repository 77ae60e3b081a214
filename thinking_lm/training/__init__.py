"""Training: from a loss function, data and configs to a work directory with checkpoints and metrics."""
