"""Files that are either the old ones or the new ones, never half of each, on local disks and object stores."""

import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any

from etils import epath

from thinking_lm.errors import WorkdirError


def is_local(path: epath.Path) -> bool:
  """Whether `path` is on a file system of this machine: only there are locks, renames and fsync what they promise."""
  return "://" not in os.fspath(path)


def canonical(value: Any, indent: int | None = None) -> str:
  """The one JSON text of a value: sorted keys, no NaN; `indent` is for files that people read."""
  separators = (",", ":") if indent is None else (",", ": ")
  return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False, indent=indent, separators=separators)


def sha256(data: bytes | str) -> str:
  """Hexadecimal SHA-256 of bytes, or of a text in UTF-8."""
  return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def sha256_file(path: epath.Path) -> str:
  """Hexadecimal SHA-256 of a file's bytes, read in pieces."""
  total = hashlib.sha256()
  with path.open("rb") as file:
    while piece := file.read(1 << 22):
      total.update(piece)
  return total.hexdigest()


def fsync(path: epath.Path) -> None:
  """Asks the disk to keep a file's bytes, or a directory's entries; does nothing on an object store."""
  if is_local(path):
    descriptor = os.open(os.fspath(path), os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


def check_writable(path: pathlib.Path) -> None:
  """Makes the directory of a file that is to be written later. Raises WorkdirError if it could not be."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
      pass
  except OSError as error:
    raise WorkdirError(f"cannot write {path}: {error.strerror}") from error
  if path.is_dir():
    raise WorkdirError(f"cannot write {path}: it is a directory")


def write_atomic(path: epath.Path, text: str) -> None:
  """Writes a small file so that a reader, or a restart after a crash, sees all of it or what was there before."""
  if not is_local(path):
    path.write_text(text)  # An object appears whole when its upload ends.
    return
  new = path.parent / f".{path.name}.new"
  new.write_text(text)
  fsync(new)
  new.replace(path)
  fsync(path.parent)
