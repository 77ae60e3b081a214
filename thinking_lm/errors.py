"""What can go wrong for a user, each with its exit code, and the one place that turns it into one clear line.

A message says what was got, what is possible and how to mend it. Anything that is not one of these is a defect of
ours and keeps its traceback, but for what a config file raises: that is told with the file's line.
"""

import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags, logging


class ThinkingLMError(Exception):
  """Base of every error whose message is meant for the user; `exit_code` is what the process ends with."""

  exit_code = 1


class UsageError(ThinkingLMError):
  """The command line is wrong."""

  exit_code = 64


class DataError(ThinkingLMError):
  """Input data, or every checkpoint, is damaged or unusable."""

  exit_code = 65


class DivergedError(ThinkingLMError):
  """Training stopped making sense: too many non-finite steps in a row, or no progress over several attempts."""

  exit_code = 70


class WorkdirError(ThinkingLMError):
  """The work directory cannot be created, written or locked."""

  exit_code = 73


class SaveError(ThinkingLMError):
  """Writing a checkpoint failed; a retry may succeed."""

  exit_code = 74


class Preempted(ThinkingLMError):
  """A signal asked the run to stop; its state is saved and the same command goes on from it."""

  exit_code = 75


class ConfigError(ThinkingLMError):
  """The configuration, or a checkpoint of another configuration. Lists every fault at once."""

  exit_code = 78

  def __init__(self, faults: str | Sequence[str]):
    self.faults = [faults] if isinstance(faults, str) else list(faults)
    super().__init__("\n".join(self.faults))


def _tell(error: ThinkingLMError) -> int:
  for line in str(error).splitlines():
    print(f"error: {line}", file=sys.stderr, flush=True)
  return error.exit_code


def last_line(error: BaseException) -> str:
  """Why a file cannot be read, of an error of ml_collections, which says before it what was tried."""
  return str(error).strip().rpartition("\n")[2].strip()


def _config_fault(error: BaseException | None) -> ConfigError | None:
  """What is wrong with a config file, of an error that came while it was run, which is while flags are parsed."""
  while error is not None:
    frames = list(traceback.walk_tb(error.__traceback__))
    parsers = [frame for frame, _ in frames if type(frame.f_locals.get("self")).__name__ == "ConfigFileFlagParser"]
    if parsers and not str(error).startswith("Error whilst parsing config file"):  # that one goes around another
      own = [(frame, line) for frame, line in frames if frame.f_globals.get("__name__") == "config_config"]
      where = f" ({own[-1][0].f_code.co_filename}, line {own[-1][1]})" if own else ""
      reason = last_line(error) if isinstance(error, OSError) else " ".join(str(error).split())
      return ConfigError(f"--config={parsers[-1].f_locals['path']}: {type(error).__name__}: {reason}{where}")
    error = error.__cause__ or error.__context__
  return None


def _parse_flags(argv: Sequence[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except ThinkingLMError as error:  # of a config file, which is run while flags are parsed
    sys.exit(_tell(error))
  except (Exception, SystemExit) as error:
    if fault := _config_fault(error):
      sys.exit(_tell(fault))
    if isinstance(error, SystemExit):  # --help, which absl ends with 1
      sys.exit(0)
    reason = str(error)
    if not isinstance(error, flags.Error):
      # ml_collections raises these for a --config.key that does not exist; from anywhere else they are a defect.
      innermost = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
      ours = innermost.f_globals["__name__"].split(".")[0] != "ml_collections"
      if ours or not isinstance(error, AttributeError | KeyError):
        raise
      reason = f"no such config key: {error.args[0]}"
  print(f"error: {' '.join(reason.split())}; see --help", file=sys.stderr, flush=True)
  sys.exit(UsageError.exit_code)


def run(main: Callable[[Sequence[str]], object], names: bool = False) -> None:
  """`absl.app.run` for a command of ours: a ThinkingLMError becomes its lines on stderr and its exit code.

  What libraries log below a warning is not shown, unless --verbosity asks for it. names: whether there may be
  arguments without --, which `main` reads.
  """

  def guarded(argv: Sequence[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)
    try:
      if len(argv) > 1 and not names:
        raise UsageError(f"unexpected argument {argv[1]!r}; options start with --, see --help")
      main(argv)
    except ThinkingLMError as error:
      sys.exit(_tell(error))
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr)
      sys.exit(128 + signal.SIGINT)

  app.run(guarded, flags_parser=_parse_flags)
