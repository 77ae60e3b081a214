"""Continues prompts with a trained model, thinking as it was trained to.

  python -m thinking_lm.generate --workdir=DIR --prompt="The " [--prompt=...] [--temperature=0] [--thoughts=shown]
    [--thought=halting=entropy,stop_below=1.0]

Several prompts are decoded as one batch. With --thoughts=shown each thought stands in brackets before the token it led
to; for a latent or pause thought these are the tokens that the output head reads off its think slots. --output=FILE
writes one JSON line for every continuation: prompt, text, tokens, log-probabilities and thoughts. --thought changes
where, how and how long the same parameters think, as in `thinking_lm.evaluate`.

Exit codes: 0 done, 64 wrong command line, 65 damaged data or checkpoints, 73 the output cannot be written, 78 wrong
config.
"""

import base64
import json
import pathlib
import sys
import time

from absl import flags

from thinking_lm import errors
from thinking_lm.errors import ConfigError, UsageError, WorkdirError

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a trained run; gs:// paths also work.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue, once or more; none: a fresh document.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "File whose bytes are one more prompt.")
_COUNT = flags.DEFINE_integer("count", 1, "Continuations of each prompt.", lower_bound=1)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "Longest continuation, in real tokens.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Of real tokens; 0: always the most likely one.", lower_bound=0.0)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k most likely tokens only; 0: from all.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Of everything that is drawn.", lower_bound=0, upper_bound=2**32 - 1)
_THOUGHT = flags.DEFINE_list(
  "thought", [], "Options of the thought section for this run, such as halting=entropy,stop_below=1.0 or length=2."
)
_THOUGHTS = flags.DEFINE_enum("thoughts", "hidden", ["hidden", "shown"], "Whether thoughts are printed.")
_OUTPUT = flags.DEFINE_string("output", None, "Also write JSON lines to this file.")
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "Where the run's tokenizer lies now, as in data.tokenizer.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Started on every host: join the others with jax.distributed.")
_AVERAGED = flags.DEFINE_bool("averaged", False, "The moving average of the parameters (runs with optimizer.ema).")


def _prompts() -> list[bytes]:
  prompts = [prompt.encode() for prompt in _PROMPT.value]
  if _PROMPT_FILE.value:
    try:
      prompts.append(pathlib.Path(_PROMPT_FILE.value).read_bytes())
    except OSError as error:
      raise UsageError(f"cannot read --prompt_file={_PROMPT_FILE.value}: {error.strerror}") from error
  return prompts or [b""]


def main(argv) -> None:
  """Loads, generates, prints."""
  del argv
  if not _WORKDIR.value:
    raise UsageError("--workdir=DIR is needed; see --help")
  import jax

  from thinking_lm import experiment
  from thinking_lm.model.generate import Sampling
  from thinking_lm.training import mesh, state, workdir

  if _DISTRIBUTED.value:
    mesh.join("--distributed")
  prompts = _prompts()
  subject, params, step = experiment.load(
    _WORKDIR.value, _AVERAGED.value, rows=False, places=dict(tokenizer=_TOKENIZER.value)
  )
  workdir.agree_command(step, subject.data.digest, prompts=[prompt.hex() for prompt in prompts])
  subject = subject.rethought(_THOUGHT.value)
  if subject.data.task is not None and subject.data.task.tagging:
    raise ConfigError(
      f"this model labels every token of a {subject.config.data.task.name}: there is no text to continue; see "
      "python -m thinking_lm.evaluate"
    )
  sampling = Sampling(_MAX_TOKENS.value, _TEMPERATURE.value, _TOP_K.value, _COUNT.value)
  began = time.monotonic()
  made = subject.generate(params, prompts, state.key(_SEED.value, "generate"), sampling)
  seconds = time.monotonic() - began
  if jax.process_index() == 0:
    _tell(subject, step, prompts, made, seconds)


def _tell(subject, step: int, prompts, made, seconds: float) -> None:
  """Prints what was made, and writes it where --output says."""
  from thinking_lm.evaluation import display

  tokenizer, shown = subject.data.tokenizer, _THOUGHTS.value == "shown"
  prompts = [prompt for prompt in prompts for _ in range(_COUNT.value)]
  for row, prompt in enumerate(prompts):
    print(f"--- {row + 1} of {len(prompts)}: {display.inline(prompt) or '(a fresh document)'}")
    print(display.continuation(tokenizer, made, row, shown, sys.stdout.isatty(), subject.model.confidence))
  drawn, thought = int(made.length_B.sum()), int((made.thoughts_BXn >= 0).sum())
  print(
    f"--- step {step}: {drawn} real tokens, {thought} think tokens, {seconds:.1f} s with compilation", file=sys.stderr
  )
  if _OUTPUT.value:
    _write(prompts, made, tokenizer, subject.model.confidence)


def _write(prompts, made, tokenizer, confidence) -> None:
  from thinking_lm.evaluation import display

  lines = []
  for row, prompt in enumerate(prompts):
    length = int(made.length_B[row])
    text = tokenizer.decode(made.tokens_BX[row, :length])
    record = dict(
      prompt=prompt.decode(errors="replace"),
      text=text.decode(errors="replace"),
      bytes=base64.b64encode(text).decode(),
      tokens=made.tokens_BX[row, :length].tolist(),
      logp=made.logp_BX[row, :length].tolist(),
      thoughts={int(i): made.thoughts_BXn[row, i].tolist() for i in made.thought_BX[row].nonzero()[0]},
    )
    said = {i: display.pairs(tokens, confidence) for i, tokens in record["thoughts"].items()}
    if any(said.values()):
      record["reports"] = said
    lines.append(json.dumps(record) + "\n")
  try:
    pathlib.Path(_OUTPUT.value).write_text("".join(lines))
  except OSError as error:
    raise WorkdirError(f"cannot write --output={_OUTPUT.value}: {error.strerror}") from error


if __name__ == "__main__":
  errors.run(main)
