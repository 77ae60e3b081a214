"""S3 word problem: the running product of 12 group elements, one latent thought after each element."""

from thinking_lm import experiment


def get_config():
  """One layer, which alone cannot track the state; a latent thought can carry it."""
  config = experiment.default_config()
  config.data.source = "task"
  config.data.task.name = "word_problem"
  config.data.sequence_length = 0
  config.model.layers = 1
  config.model.width = 64
  config.thought.kind = "latent"
  config.thought.length = 1
  config.train.steps = 1000
  config.train.batch_size = 128
  config.optimizer.learning_rate = 2e-3
  config.optimizer.schedule = "constant"
  config.optimizer.warmup_steps = 100
  config.optimizer.weight_decay = 0.0
  config.train.log_every = 50
  return config
