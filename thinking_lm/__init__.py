"""thinking_lm: language models that think between tokens, in JAX and Flax."""

__version__ = "0.1.0"
