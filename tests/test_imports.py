"""
Imports go down: every module has a floor, and imports from lower floors or from its own room alone.

    python tests/test_imports.py        the floors, and what each room imports
"""

import ast
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_CODE = ("config", "out", "release", "shared", "venv")  # config/ is parsed, never imported
# From the top. A name is a room: a module, or a package with everything in it that is no room of its own.
FLOORS = (
    ("tests",),
    ("paper", "notebooks"),
    ("bench", "examples", "explore", "experiments.audit"),
    ("experiments.report",),
    ("explorer", "experiments.run_all"),
    ("train", "sample", "export", "upcycle", "experiments"),
    ("experiments.studies.runs",),
    ("experiments.lab", "formats"),
    ("reflow",),
    ("attribution",),
    ("dictionary", "recoding", "hooks", "data", "metrics"),
    ("checkpoint",),
    ("hardware", "files"),
    ("model", "configurator", "threads"),
)
STANDALONE = ("experiments", "examples")  # packages of scripts: none imports another one of them
LEAVES = ("experiments", "experiments.studies")  # their __init__.py: names, no code; siblings may read them
ONLY_FROM = {"train": ("tests", "bench")}  # {module: rooms that may import it}


def module_name(path):
    """Path of a file below the root -> the name that it is imported by."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source, package, known):
    """[(line, module)] of all imports in `source`, in functions too, of the modules in `known`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = [*package.split("."), ""]  # of a relative import: one dot is the package itself
            parts = above[: -node.level] if node.level else []
            base = ".".join(parts + ([node.module] if node.module else []))
            # `from experiments import lab` imports a module, `from experiments.lab import Lab` a thing in it
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names]
        else:
            continue
        found += [(node.lineno, name) for name in dict.fromkeys(names) if name in known]
    return found


@cache
def read_tree(root=ROOT):
    """{module: [(line, imported module)]} of all our Python files."""
    files = sorted(root.glob("*.py"))
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and folder.name not in NOT_CODE and not folder.name.startswith("."):
            files += sorted(folder.rglob("*.py"))
    names = {path: module_name(path.relative_to(root)) for path in files}
    known = set(names.values())
    tree = {}
    for path, name in names.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        tree[name] = imports(path.read_text(encoding="utf-8"), package, known)
    return tree


def room(module):
    """The longest name in FLOORS that stands for a module; None if it has no floor."""
    names = [name for floor in FLOORS for name in floor if f"{module}.".startswith(f"{name}.")]
    return max(names, key=len, default=None)


def level(module):
    """Number of a module's floor, 0 at the bottom."""
    return next(len(FLOORS) - 1 - i for i, floor in enumerate(FLOORS) if room(module) in floor)


def why_not(importer, imported):
    """What is wrong with an import; "" if nothing is."""
    here = room(importer)
    there = room(imported)
    if there in ONLY_FROM and here not in ONLY_FROM[there]:
        return f"only {' and '.join(ONLY_FROM[there])} may import {there}"
    if level(imported) > level(importer):
        return "goes up"
    if here in STANDALONE and here == there and imported not in LEAVES:
        return f"{here}/ holds scripts that stand alone"
    if level(imported) == level(importer) and here != there:
        return "goes sideways, to another room of the same floor"
    return ""


def violations(tree):
    """All imports that break a rule, and modules without a floor, as lines of text."""
    homeless = [f"{module} has no floor: add it to FLOORS" for module in tree if room(module) is None]
    if homeless:
        return homeless
    lines = []
    for importer, found in tree.items():
        for line, imported in found:
            if problem := why_not(importer, imported):
                lines.append(f"{importer}, line {line}, imports {imported}: {problem}")
    return lines


def arrows(tree):
    """{room: rooms that it imports, from the highest floor to the lowest}."""
    found = {name: set() for floor in FLOORS for name in floor if any(room(m) == name for m in tree)}
    for importer, imported in ((a, b) for a, lines in tree.items() for _, b in lines):
        if room(importer) != room(imported) and imported not in LEAVES:
            found[room(importer)].add(room(imported))
    return {name: sorted(rooms, key=lambda r: (-level(r), r)) for name, rooms in found.items()}


def test_no_import_goes_up():
    assert violations(read_tree()) == []


def test_no_module_imports_itself_in_a_circle():
    graph = {module: {imported for _, imported in found} for module, found in read_tree().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize(
    "importer, line, problem",
    [
        ("model", "import checkpoint", "goes up"),
        ("checkpoint", "def f():\n    from data.shards import Dataset", "goes up"),
        ("hooks", "from dictionary import top_k", "sideways"),
        ("experiments.lab.lab", "from experiments import signal_lens", "goes up"),
        ("reflow", "from experiments.lab import Lab", "goes up"),
        ("experiments.lab.lab", "from formats import llama", "sideways"),
        ("formats.llama", "import export", "goes up"),
        ("sample", "import export", "sideways"),
        ("export", "import train", "only tests and bench may import train"),
        ("paper.build", "from train import TrainConfig", "only tests and bench may import train"),
        ("experiments.gene_tampering", "from experiments.emotion_surgery import tilt", "stand alone"),
        ("experiments.gene_tampering", "from . import emotion_surgery", "stand alone"),
        ("experiments.studies.stability", "from experiments.studies.convergence import run", "stand alone"),
        ("experiments.studies.stability", "from experiments import signal_lens", "stand alone"),
        ("experiments.signal_lens", "import experiments.run_all", "goes up"),
        ("experiments.run_all", "from paper import build", "goes up"),
        ("novelty", "import json", "no floor"),
    ],
)
def test_a_wrong_import_is_found(importer, line, problem):
    """Also inside functions, in each spelling."""
    check = violations(planted(importer, line))
    assert len(check) == 1 and problem in check[0]


@pytest.mark.parametrize(
    "importer, line",
    [
        ("experiments.studies.stability", "from experiments.studies.runs import Study"),
        ("experiments.studies.train_runs", "from experiments.studies import STUDIES"),
        ("experiments.report", "from experiments.run_all import NAMES"),
        ("experiments.signal_lens", "from reflow import Model\nfrom experiments.lab import Lab"),
        ("export", "from formats import llama\nimport torch, model"),
        ("data.offline.prepare", "from data.sotu.prepare import split"),
        ("bench", "from train import TrainConfig"),
    ],
)
def test_a_right_import_is_not(importer, line):
    assert violations(planted(importer, line)) == []


def planted(importer, source):
    """The tree as it is, with one module that imports something else."""
    known = {*read_tree(), "formats.llama", "experiments.emotion_surgery"}
    tree = dict.fromkeys(known, [])
    return tree | {importer: imports(source, importer.rpartition(".")[0], known)}


COMMANDS = [ROOT / f"{name}.py" for name in ("train", "sample", "export", "explore", "reflow")]
COMMANDS += sorted([*ROOT.glob("experiments/*.py"), *ROOT.glob("experiments/studies/*.py")])


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_commands_set_how_threads_wait_before_torch_reads_it(path):
    """`import threads` comes before every import that may load torch."""
    source = path.read_text(encoding="utf-8")
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    others = [name for name in names if name.split(".")[0] not in sys.stdlib_module_names]
    assert "__main__" not in source or others[0] == "threads"


if __name__ == "__main__":
    tree = read_tree()
    for name, below in arrows(tree).items():
        print(f"{level(name):>3}  {name:24} -> {', '.join(below) or 'nothing of ours'}")
    print("\n".join(["", *violations(tree)]))
