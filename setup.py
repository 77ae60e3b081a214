"""The package's metadata; tool settings are in pyproject.toml, exact tested versions in requirements/."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).resolve().parent

# Training needs these ten. NumPy, etils (gs:// paths: orbax) and array-record (grain) come with them.
# Two bands, because flax up to 0.12.8 breaks on jax 0.11.1 and later, and newer flax needs it.
TRAINING = [
  "jax>=0.10.2,<0.11; python_version < '3.12'",
  "jax>=0.11.1,<0.13; python_version >= '3.12'",
  "flax>=0.12.8,<0.12.9; python_version < '3.12'",
  "flax>=0.12.12,<0.13; python_version >= '3.12'",
  "optax>=0.2.8,<0.3",
  "orbax-checkpoint>=0.12.8,<0.13",
  "grain>=0.2.18,<0.3",
  "tensorstore>=0.1.86,<0.2",
  "ml-collections>=1.1,<2",
  "absl-py>=2.5,<3",
  "tensorboardX>=2.6.5,<3",
  "tqdm>=4.66,<5",
]

EXTRAS = {
  "gcs": ["etils[epath-gcs]>=1.15,<2"],
  "report": ["matplotlib>=3.11,<4"],
  "test": ["packaging>=24", "pytest>=9,<10", "pytest-xdist>=3.8,<4", "ruff>=0.17.6,<0.18"],
  "tokenizers": ["sentencepiece>=0.2.1,<0.3", "tokenizers>=0.22,<1"],
  "tpu": ["jax[tpu]"],
}

if __name__ == "__main__":
  setuptools.setup(
    name="thinking_lm",
    version=re.search(r'^__version__ = "(.+)"$', (ROOT / "thinking_lm/__init__.py").read_text(), re.MULTILINE)[1],
    description="Language models that think between tokens, in JAX and Flax",
    python_requires=">=3.11",
    install_requires=TRAINING,
    extras_require=EXTRAS,
    packages=setuptools.find_packages(include=["thinking_lm", "thinking_lm.*"]),
  )
