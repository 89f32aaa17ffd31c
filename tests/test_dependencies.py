"""Imports run one way through the package: from what is used towards what uses it, in no circle."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "python" / "glm_fused"

# The rows go from low to high. A module may import what is in its own row or in a lower one.
# - ``checkpoint`` is above ``models``: it compares files with the modules of a model, and a model
#   takes any weights that have its names.
# - ``streaming`` is above both: it puts banks into a model, from the files of a checkpoint.
# - ``""`` is the package itself, which shows the public names; only commands use it.
# - ``__main__`` is a command line wherever it stands, so mlx-lm's takes the options of ``cli``.
ORDER = (
    ("_ext", "_abi", "validation", "foreign", "environment", "host", "memory", "drawing"),
    ("formats",),
    ("ops",),
    ("models",),
    ("checkpoint",),
    ("streaming",),
    ("generation",),
    ("parallel",),
    ("engine_options", "loader", "drafting", "engine"),
    ("",),
    ("mlx_lm", "selftest"),
    ("conversion",),
    ("profiling",),
    ("measuring",),
    ("serve",),
    ("cli",),
    ("__main__", "mlx_lm.__main__"),
)


class Import(NamedTuple):
    """An import of one module by another, at a line of a file; names are within the package."""

    importer: str
    imported: str
    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {_shown(self.importer)} imports {_shown(self.imported)}"


def modules(package: Path) -> dict[str, Path]:
    """The files of all modules, by their names within ``package``.

    A folder's name stands for its ``__init__``.
    """
    found = {}
    for file in sorted([*package.rglob("*.py"), *package.rglob("*.pyi")]):
        parts = file.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(package: Path) -> list[Import]:
    """All imports of the package's own modules, even in functions and for type checkers.

    Importing a module also runs its folder's ``__init__``, which does not count here.
    """
    known, found = modules(package), []
    for name, file in known.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
            for imported in _imported(node, name, file, package.name, known):
                found.append(Import(name, imported, file, node.lineno))
    return found


def _imported(
    node: ast.AST, importer: str, file: Path, package: str, known: dict[str, Path]
) -> set[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
        own = [n for n in names if n == package or n.startswith(f"{package}.")]
        return {name.removeprefix(package).removeprefix(".") for name in own}
    if not isinstance(node, ast.ImportFrom):
        return set()
    if node.level:
        folder = importer.split(".") if importer else []
        folder = folder if file.stem == "__init__" else folder[:-1]
        base = folder[: len(folder) - node.level + 1] + (node.module or "").split(".")
    elif (node.module or "").split(".")[0] == package:
        base = node.module.split(".")[1:]
    else:
        return set()
    base = ".".join(part for part in base if part)
    inner = {alias.name: f"{base}.{alias.name}".removeprefix(".") for alias in node.names}
    return {path if path in known else base for path in inner.values()}


def upward(found: list[Import], order=ORDER) -> list[str]:
    """Say which modules import something above themselves, and which have no place in the order."""
    problems = []
    for one in found:
        low, high = _row(one.importer, order), _row(one.imported, order)
        for name, row in ((one.importer, low), (one.imported, high)):
            if row is None:
                problems.append(f"{one}: {_shown(name)} has no place in the order")
        if low is not None and high is not None and low < high:
            problems.append(f"{one}, which is above it")
    return problems


def circles(found: list[Import]) -> list[str]:
    """Each import that closes a circle, with the way back."""
    edges: dict[str, dict[str, Import]] = {}
    for one in found:
        edges.setdefault(one.importer, {}).setdefault(one.imported, one)
    problems = []
    for one in found:
        way = _way(edges, one.imported, one.importer)
        if way is not None:
            steps = "".join(f"\n  {step}" for step in way)
            problems.append(f"{one}, and back:{steps}")
    return problems


def _way(edges: dict[str, dict[str, Import]], start: str, goal: str) -> list[Import] | None:
    """The imports that lead from one module to another; None if none do."""
    ways: dict[str, list[Import]] = {start: []}
    queue = [start]
    while queue:
        name = queue.pop(0)
        if name == goal:
            return ways[name]
        for imported, one in edges.get(name, {}).items():
            if imported not in ways:
                ways[imported] = [*ways[name], one]
                queue.append(imported)
    return None


def _row(name: str, order) -> int | None:
    """A module's row: that of its own name, or of the innermost folder that is listed."""
    rows = {entry: row for row, entries in enumerate(order) for entry in entries}
    while name:
        if name in rows:
            return rows[name]
        name = name.rpartition(".")[0]
        if not name:
            return None
    return rows.get("")


def _shown(name: str) -> str:
    return name or "the package"


def test_imports_run_one_way():
    assert not (problems := upward(imports(PACKAGE))), "\n".join(problems)


def test_imports_make_no_circle():
    assert not (problems := circles(imports(PACKAGE))), "\n".join(problems)


def test_names_that_are_loaded_late_are_seen():
    """The package loads its public names by their modules' names, which no import shows."""
    import glm_fused

    late = {(module, name) for name, module in glm_fused._LAZY.items()}
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If))
    assert late == {(n.module, alias.name) for n in block.body for alias in n.names}
    for name, file in modules(PACKAGE).items():
        assert name == "" or "import_module" not in file.read_text(), file


LATE = """
def run():
    from ..engine import Engine
"""
FOR_TYPES = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from ..cli.arguments import size
"""


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("ops/late.py", LATE, "3: ops.late imports engine, which is above it"),
        ("models/typed.py", FOR_TYPES, "4: models.typed imports cli.arguments, which is above it"),
        ("models/a.py", "import glm_fused.generation.chat", "1: models.a imports generation.chat"),
        ("models/a.py", "from glm_fused.loader import load", "1: models.a imports loader"),
        (
            "streaming/a.py",
            "import os\nfrom .. import loader, ops",
            "2: streaming.a imports loader",
        ),
        ("checkpoint/a.py", "from .. import load", "1: checkpoint.a imports the package"),
        ("ops/__init__.py", "from ..models import moe", "1: ops imports models.moe"),
        ("stray.py", "from . import ops", "1: stray imports ops: stray has no place in the order"),
    ],
)
def test_a_planted_upward_import_is_found(tmp_path, file, text, expected):
    package = planted(tmp_path, {file: text})
    (problem,) = upward(imports(package))
    assert problem.startswith(f"{package / file}:{expected}")


def test_what_runs_downward_is_not_reported(tmp_path):
    text = "import os, mlx_lm\nfrom .. import ops\nfrom ..ops.paths import x\nfrom . import moe\n"
    found = imports(planted(tmp_path, {"models/a.py": text}))
    assert [one.imported for one in found] == ["ops", "ops.paths", "models.moe"]
    assert upward(found) == circles(found) == []


def test_a_planted_circle_is_found(tmp_path):
    """It leads through three modules, one of which imports for a type checker and one late."""
    files = {
        "models/a.py": "from . import b",
        "models/b.py": "if TYPE_CHECKING:\n    from .c import C",
        "models/c.py": "def f():\n\n    from .a import A",
    }
    package = planted(tmp_path, files)
    assert upward(imports(package)) == []
    folder = package / "models"
    assert circles(imports(package))[0] == (
        f"{folder / 'a.py'}:1: models.a imports models.b, and back:\n"
        f"  {folder / 'b.py'}:2: models.b imports models.c\n"
        f"  {folder / 'c.py'}:3: models.c imports models.a"
    )


def test_a_module_that_imports_itself_is_a_circle(tmp_path):
    package = planted(tmp_path, {"ops/__init__.py": "from glm_fused import ops"})
    (problem,) = circles(imports(package))
    assert problem.endswith("ops/__init__.py:1: ops imports ops, and back:")


def planted(folder: Path, files: dict[str, str]) -> Path:
    """Write a package of empty modules, except for ``files``, which have a text."""
    package = folder / "glm_fused"
    names = ("ops/paths", "models/moe", "cli/arguments", "generation/chat", "engine", "loader")
    packages = ("", "ops/", "models/", "checkpoint/", "streaming/", "generation/", "cli/")
    for name in (*names, *(f"{path}__init__" for path in packages)):
        file = package / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for name, text in files.items():
        (package / name).write_text(text)
    return package
