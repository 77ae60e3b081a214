"""The architecture is a test: who may import whom, what no file may contain, and how large a file may grow."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHIPPED = sorted(path for name in ("thinking_lm", "configs", "xm_launch") for path in (ROOT / name).rglob("*.py"))
FILES = SHIPPED + sorted((ROOT / "tests").rglob("*.py"))

GLOSSARY = {"types", "metrics", "errors", "config", "sharding"}
BELOW = GLOSSARY | {"data", "thoughts", "model", "objectives"}
MAY_IMPORT = {
  "__init__": set(),
  "errors": set(),
  "types": set(),
  "sharding": set(),
  "metrics": GLOSSARY,
  "config": GLOSSARY,
  "recipes": GLOSSARY,
  "data": GLOSSARY,
  "thoughts": GLOSSARY | {"data"},
  "model": GLOSSARY | {"data", "thoughts"},
  "objectives": GLOSSARY | {"data", "thoughts"},  # an objective sees a trace, never the model
  "training": GLOSSARY | {"data"},  # the step never learns what it optimises
  "evaluation": BELOW,
  "analysis": BELOW | {"evaluation", "training"},
  "rules": BELOW,
  "beside": BELOW,
  "experiment": BELOW | {"evaluation", "training", "rules", "beside"},
}
MAIN = BELOW | {"evaluation", "training", "analysis", "experiment", "rules"}  # a top-level file with a __main__ guard

UNSAFE_MODULES = {
  *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "tarfile", "yaml"),
}
UNSAFE_CALLS = {
  *("eval", "exec", "__import__", "builtins.eval", "builtins.exec", "importlib.import_module"),
  *("torch.load", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
}
UNSAFE_ARGUMENTS = {"shell", "allow_pickle"}
VAGUE_NAMES = {"utils", "util", "common", "misc", "helpers", "helper"}
FILE_LINES, FUNCTION_LINES = 400, 60


def imported(path: str, tree: ast.AST) -> list[tuple[str, str]]:
  """(local name, full dotted name) of everything that is imported, at any depth of the file."""
  names = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names += [(alias.asname or alias.name, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      package = ".".join(pathlib.PurePosixPath(path).parts[: -node.level]) + "." if node.level else ""
      source = (package + (node.module or "")).strip(".")
      names += [(alias.asname or alias.name, f"{source}.{alias.name}") for alias in node.names]
  return names


def layer_faults(path: str, source: str) -> list[str]:
  """Imports against the order of the layers."""
  tree = ast.parse(source)
  names = [name for _, name in imported(path, tree)]
  layer = pathlib.PurePosixPath(path).with_suffix("").parts[1]
  used = {(name + ".__init__").split(".")[1] for name in names if name.split(".")[0] == "thinking_lm"} - {"__version__"}
  is_main = any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)
  if layer not in MAY_IMPORT and not is_main:
    return [f"{layer} is neither a layer of MAY_IMPORT nor a main"]
  faults = [f"{layer} imports {name}" for name in sorted(used - {layer} - MAY_IMPORT.get(layer, MAIN))]
  if layer != "experiment" and {"data", "model", "objectives"} <= used:
    faults.append("only experiment wires data, model and objectives together")
  takes_config_dicts = layer in {"config", "experiment"} or is_main
  if any(name.split(".")[0] == "ml_collections" for name in names) and not takes_config_dicts:
    faults.append("a ConfigDict passes neither config nor experiment")
  return faults


def safety_faults(path: str, source: str) -> list[str]:
  """Ways in which data could become code."""
  tree = ast.parse(source)
  names = imported(path, tree)
  full_names = {name for _, name in names}
  roots = {name.split(".")[0] for name in full_names}
  faults = [f"imports {name}" for name in sorted(roots & UNSAFE_MODULES)]
  faults += [f"imports {name}" for name in sorted(UNSAFE_CALLS & full_names)]
  for node in ast.walk(tree):
    if isinstance(node, ast.Name | ast.Attribute):
      root, _, rest = ast.unparse(node).partition(".")
      uses = {f"{full}.{rest}".strip(".") for local, full in [(root, root), *names] if local == root} & UNSAFE_CALLS
      faults += [f"line {node.lineno} uses {full}" for full in sorted(uses)]
    elif isinstance(node, ast.keyword) and node.arg in UNSAFE_ARGUMENTS and ast.unparse(node.value) != "False":
      faults.append(f"line {node.lineno} passes {ast.unparse(node)}")
  return faults


def size_faults(path: str, source: str) -> list[str]:
  """Files and functions that have outgrown one idea, and names that say nothing."""
  lines = len(source.splitlines())
  faults = [f"{lines} lines; at most {FILE_LINES}"] if lines > FILE_LINES else []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      lines = node.end_lineno - node.lineno + 1
      faults += [f"{node.name}: {lines} lines; at most {FUNCTION_LINES}"] if lines > FUNCTION_LINES else []
  words = {word for part in pathlib.PurePosixPath(path).with_suffix("").parts for word in part.split("_")}
  return faults + [f"the name {word} says nothing" for word in sorted(words & VAGUE_NAMES)]


def faults_of(check, paths) -> list[str]:
  """What `check` finds in real files."""
  found = []
  for path in paths:
    name = path.relative_to(ROOT).as_posix()
    found += [f"{name}: {fault}" for fault in check(name, path.read_text(encoding="utf-8"))]
  return found


def test_layers_import_only_what_lies_below():
  assert faults_of(layer_faults, [path for path in SHIPPED if path.is_relative_to(ROOT / "thinking_lm")]) == []


def test_data_never_becomes_code():
  assert faults_of(safety_faults, SHIPPED) == []


def test_files_and_functions_stay_small_and_named():
  assert faults_of(size_faults, FILES) == []


def test_every_folder_of_the_package_is_installed():
  folders = {path.parent for path in SHIPPED if path.is_relative_to(ROOT / "thinking_lm")}
  assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize(
  ("path", "source"),
  [
    ("thinking_lm/types.py", "from thinking_lm.metrics import Mean"),
    ("thinking_lm/data/tasks.py", "from thinking_lm.thoughts import placement"),
    ("thinking_lm/data/tasks.py", "from ..thoughts.placement import PLACEMENTS"),
    ("thinking_lm/data/tasks.py", "from thinking_lm.model import init\nfrom optax import init"),
    ("thinking_lm/thoughts/tokens.py", "import thinking_lm.model.decoder"),
    ("thinking_lm/model/rollout.py", "from thinking_lm import objectives"),
    ("thinking_lm/objectives/rewards.py", "def late():\n  from thinking_lm.model import rollout"),
    ("thinking_lm/training/loop.py", "from thinking_lm.evaluation import controls"),
    ("thinking_lm/training/step.py", "from thinking_lm.objectives.objective import loss"),
    ("thinking_lm/training/step.py", "from thinking_lm.thoughts import tokens"),
    ("thinking_lm/training/hooks.py", "from thinking_lm import experiment"),
    ("thinking_lm/evaluation/controls.py", "from thinking_lm import data, model, objectives"),
    ("thinking_lm/evaluation/controls.py", "from thinking_lm.train import main"),
    ("thinking_lm/model/decoder.py", "import ml_collections"),
    ("thinking_lm/training/loop.py", "from ml_collections import config_dict"),
    ("thinking_lm/train.py", "from thinking_lm import data, model, objectives\nif __name__ == '__main__':\n  main()"),
    ("thinking_lm/registry.py", "names = {}"),
  ],
)
def test_a_wrong_import_is_seen(path, source):
  assert len(layer_faults(path, source)) == 1


@pytest.mark.parametrize(
  "source",
  [
    *(f"import {name}" for name in sorted(UNSAFE_MODULES)),
    *(f"from {name} import loads" for name in sorted(UNSAFE_MODULES)),
    *("eval(text)", "exec(text)", "table['run'] = eval", "__import__(name)"),
    *("import torch\ntorch.load(path)", "import torch as t\nt.load(path)", "from torch import load"),
    *("import os\nos.system(line)", "import os as o\no.popen(line)", "from os import system as run"),
    *("import subprocess as s\ns.run(line, shell=True)", "run(line, shell=flag)", "np.load(path, allow_pickle=True)"),
    *("import importlib\nimportlib.import_module(name)", "import builtins\nbuiltins.exec(text)"),
  ],
)
def test_unsafe_code_is_seen(source):
  assert len(safety_faults("thinking_lm/data/sources.py", source)) == 1


@pytest.mark.parametrize(
  "source", ["model.eval()", "run(line, shell=False)", "import os.path\nos.path.exists(path)", "np.load(path)"]
)
def test_safe_code_is_not_accused(source):
  assert safety_faults("thinking_lm/data/sources.py", source) == []


@pytest.mark.parametrize(
  ("path", "source"),
  [
    ("thinking_lm/data/sources.py", "x = 1\n" * (FILE_LINES + 1)),
    ("thinking_lm/data/sources.py", "def f():\n" + "  x = 1\n" * FUNCTION_LINES),
    ("thinking_lm/data/sources.py", "class C:\n  async def f(self):\n" + "    x = 1\n" * FUNCTION_LINES),
    *((f"thinking_lm/data/{name}.py", "x = 1") for name in sorted(VAGUE_NAMES)),
    ("thinking_lm/model/attention_utils.py", "x = 1"),
    ("thinking_lm/common/attention.py", "x = 1"),
  ],
)
def test_growth_is_seen(path, source):
  assert len(size_faults(path, source)) == 1


def test_the_limits_themselves_are_allowed():
  source = "def f():\n" + "  x = 1\n" * (FUNCTION_LINES - 1) + "x = 1\n" * (FILE_LINES - FUNCTION_LINES)
  assert size_faults("thinking_lm/data/sources.py", source) == []
