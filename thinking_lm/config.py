"""Config sections as frozen dataclasses, and the border where a ConfigDict becomes them.

A ConfigDict is the command-line format only. Each section is a frozen dataclass in the file that reads it; its fields
are declared with `option`, which holds the default, the documentation and the range in one place. `parse` turns the
ConfigDict into the dataclasses and reports every fault at once, before anything is allocated.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from thinking_lm.errors import ConfigError, last_line


def option(default, doc: str, *, low=None, above=None, high=None, choices=None):
  """A dataclass field of a config section.

  Args:
    default: the value when nobody says otherwise; its type is the field's annotation.
    doc: one line for `--help` and for the reader.
    low: smallest allowed number, inclusive. above: the same, exclusive. high: largest allowed number, inclusive.
    choices: the allowed names: a table, which may grow later, or any iterable of strings.
  """
  if choices is not None and not isinstance(choices, Mapping):
    choices = tuple(choices)
  metadata = dict(doc=doc, low=low, above=above, high=high, choices=choices)
  return dataclasses.field(default=default, metadata=metadata)


def pick(table: Mapping[str, Any], name: str, what: str):
  """`table[name]`, or a ConfigError that lists what the table knows."""
  if name not in table:
    raise ConfigError(f"unknown {what} {name!r}; known: {', '.join(sorted(table))}")
  return table[name]


def to_config_dict(section) -> ml_collections.ConfigDict:
  """The ConfigDict that shows a dataclass (nested dataclasses become nested ConfigDicts).

  It is not locked: `parse` lists all unknown keys at once, a lock would stop at the first.
  """
  values = {}
  for field in dataclasses.fields(section):
    value = getattr(section, field.name)
    values[field.name] = to_config_dict(value) if dataclasses.is_dataclass(value) else value
  return ml_collections.ConfigDict(values)


def of_flag(flag) -> ml_collections.ConfigDict:
  """What the file of a config flag gives. Raises ConfigError if it cannot be read, or gives something else."""
  values = flag.value
  try:
    getattr(values, "keys", None)  # ml_collections keeps why a file could not be read until somebody looks
  except OSError as error:
    raise ConfigError(f"--config cannot be read: {last_line(error.__cause__ or error)}") from error
  if not isinstance(values, ml_collections.ConfigDict):
    raise ConfigError(f"--config: its get_config gives {type(values).__name__}, which is no ConfigDict")
  return values


def parse(cls: type, mapping: Mapping[str, Any], path: str = "config"):
  """The dataclass that `mapping` describes; `path` is what messages call it.

  Raises:
    ConfigError: with one line for every unknown key, wrong type, non-finite number, value out of range, and every
      line that the sections' own `faults()` methods (rules across fields) give.
  """
  faults: list[str] = []
  section = _parse(cls, mapping, path, faults)
  if faults:
    raise ConfigError(faults)
  return section


def _parse(cls, mapping, path, faults):
  fields = {field.name: field for field in dataclasses.fields(cls)}
  hints = typing.get_type_hints(cls)
  for key in mapping:
    if key not in fields:
      near = difflib.get_close_matches(key, fields, n=1)
      hint = f"; did you mean {path}.{near[0]}?" if near else ""
      faults.append(f"unknown key {path}.{key}{hint} known: {', '.join(fields)}")
  values = {}
  for name, field in fields.items():
    if name not in mapping:
      continue
    value, where = mapping[name], f"{path}.{name}"
    if dataclasses.is_dataclass(hints[name]):
      if isinstance(value, Mapping | ml_collections.ConfigDict):
        values[name] = _parse(hints[name], value, where, faults)
      else:
        faults.append(f"{where} must be a section, got {value!r}")
    else:
      before = len(faults)
      checked = _check(value, hints[name], field.metadata, where, faults)
      if len(faults) == before:  # else the default stands in, so that the rules across fields are looked at too
        values[name] = checked
  section = cls(**values)
  if hasattr(section, "faults"):
    faults.extend(f"{path}: {line}" for line in section.faults())
  return section


def _check(value, kind, metadata, where, faults):
  if typing.get_origin(kind) is tuple:
    if not isinstance(value, list | tuple):
      faults.append(f"{where} must be a tuple, got {value!r}")
      return ()
    return tuple(_check(item, typing.get_args(kind)[0], metadata, where, faults) for item in value)
  if kind is float and type(value) is int:
    value = float(value)
  if type(value) is not kind:
    faults.append(f"{where} must be {kind.__name__}, got {value!r} ({type(value).__name__})")
    return value
  if kind is float and not math.isfinite(value):
    faults.append(f"{where} must be finite, got {value!r}")
    return value
  low, above, high, choices = (metadata[key] for key in ("low", "above", "high", "choices"))
  if choices is not None and value not in choices:
    faults.append(f"{where}: unknown name {value!r}; known: {', '.join(choices)}")
  elif low is not None and value < low:
    faults.append(f"{where} must be at least {low}, got {value!r}")
  elif above is not None and value <= above:
    faults.append(f"{where} must be greater than {above}, got {value!r}")
  elif high is not None and value > high:
    faults.append(f"{where} must be at most {high}, got {value!r}")
  return value


_READ = {
  bool: lambda text: dict(true=True, false=False)[text.lower()],
  tuple: lambda text: tuple(map(int, text.split("+"))),
}
"""Types whose text is not what their constructor reads."""


def changed(section, name: str, changes: Sequence[str]):
  """A flat section with other options, each a text `option=value`; the items of a tuple are joined by `+`.

  Raises ConfigError: a value of another type, or what `parse` finds; `name` is the section's, for messages.
  """
  values = dataclasses.asdict(section)
  for change in changes:
    option, _, text = change.partition("=")
    kind = type(values.get(option, ""))
    try:
      values[option] = _READ.get(kind, kind)(text)
    except (KeyError, ValueError) as error:
      known = "true or false" if kind is bool else "whole numbers joined by +" if kind is tuple else kind.__name__
      raise ConfigError(f"{name}.{option} must be {known}, got {text!r}") from error
  return parse(type(section), values, name)


def describe(cls: type, path: str = "config") -> str:
  """One line per option: its path, default and documentation. This is the config part of `--help`."""
  lines = []
  for field in dataclasses.fields(cls):
    where = f"{path}.{field.name}"
    kind = typing.get_type_hints(cls)[field.name]
    if dataclasses.is_dataclass(kind):
      lines.append(describe(kind, where))
    else:
      choices = field.metadata["choices"]
      names = f" [{', '.join(choices)}]" if choices else ""
      lines.append(f"  --{where}={field.default!r}: {field.metadata['doc']}{names}")
  return "\n".join(lines)
