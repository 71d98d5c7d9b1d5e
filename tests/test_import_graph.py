"""No import runs upward, and none runs in a circle.

The library is a house of floors. A package of `recurx/`, or a module beside the packages, stands on
one of them and imports from the floors below; two on one floor may not import each other both ways.
Inside a package, files import each other without a circle.

Every import counts, wherever it stands: at the top of a file, inside a function, as a string that
names a module for `importlib`, and under `if TYPE_CHECKING` too, for a module that cannot be
understood without a type depends on it. That a module's package is imported before it does not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"recurx": "recurx", "recurx.kernels": "kernels"}  # package -> folder, as in setup.py
EXTENSION = "recurx._C"  # compiled: it has no file of Python

# From the ground up. Those parts of experiments that stand below it serve others as well, `""` is
# `recurx/__init__.py`, which finds each public name when it is asked for, and `_checkout` tells
# Python where the packages of a checkout lie.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "forking", "hashing", "_build_info", "_C"),
    ("atomic", "state_names", "options", "schedule", "small_ops", "tasks", "specs", "noise"),
    ("nets",),
    ("operands", "fp8", "code"),
    ("own_code", "survey"),
    ("problem", "reference"),
    ("reference_backward", "program"),
    ("measure",),
    ("packed",),
    ("kernels",),
    ("plan",),
    ("backends", "verdicts"),
    ("recompute", "choices", "comparing"),
    ("route",),
    ("trials", "readings"),
    ("probing", "lowrank"),
    ("proof",),
    ("ops", "checks"),
    ("api",),
    ("models",),
    ("weights_file",),
    ("checkpoint",),
    ("shipped_nets",),
    ("patching",),
    ("solving",),
    ("quantization", "onnx_export"),
    ("explanation",),
    ("train",),
    ("bench.profiler",),
    ("experiments.tasks",),
    ("experiments.hybrid", "_checkout"),
    ("hybrid",),
    ("",),
    ("cli",),
    ("bench",),
    ("experiments",),
    ("commands",),
    ("__main__",),
)

# (importer, imported) that still break the rules. Only to be shortened.
STILL: set[tuple[str, str]] = set()


@dataclass(frozen=True, order=True)
class Arrow:
    """An import, by full module names; `where` is its file and line."""

    importer: str
    imported: str
    where: str

    def __str__(self) -> str:
        return f"{self.where}: {self.importer} imports {self.imported}"


# ---- reading the imports -------------------------------------------------------------------------


def modules_in(root: Path, folders: Mapping[str, str]) -> dict[str, Path]:
    """{full module name: file}; a package is its `__init__.py`."""
    found = {}
    for package, folder in folders.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = [package, *path.relative_to(root / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows(root: Path, folders: Mapping[str, str] = FOLDERS) -> list[Arrow]:
    """Every import between modules of the folders."""
    modules = modules_in(root, folders)
    known = {*modules, EXTENSION}
    found = set()
    for importer, path in modules.items():
        package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, name in _named(tree, package, known):
            imported = _module_of(name, known)
            if imported not in ("", importer):
                found.add(Arrow(importer, imported, f"{path.relative_to(root)}:{line}"))
    return sorted(found)


def _named(tree: ast.Module, package: str, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, what an import names): a module, or something in one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = [node.module] if node.module else []
            if node.level:
                above = package.split(".")
                parts = above[: len(above) - node.level + 1] + parts
            yield from ((node.lineno, ".".join([*parts, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Constant) and node.value in known and "." in node.value:
            yield node.lineno, node.value


def _module_of(name: str, known: set[str]) -> str:
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


# ---- the rules -----------------------------------------------------------------------------------


def unit(module: str, floors: Sequence[Sequence[str]] = FLOORS) -> str:
    """What stands on a floor: the longest name of one that the module begins with."""
    inside = module.partition(".")[2]
    names = [n for names in floors for n in names if inside == n or inside.startswith(f"{n}.")]
    assert names or not inside, f"{module} stands on no floor: add {inside} to FLOORS"
    return max(names, key=len, default="")


def upward(found: Iterable[Arrow], floors: Sequence[Sequence[str]] = FLOORS) -> list[Arrow]:
    """The arrows that end on a higher floor than they begin."""
    level = {name: number for number, names in enumerate(floors) for name in names}
    return [a for a in found if level[unit(a.imported, floors)] > level[unit(a.importer, floors)]]


def circles(pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The groups of nodes that reach each other."""
    ahead: dict[str, set[str]] = {}
    for begin, end in pairs:
        if begin != end:
            ahead.setdefault(begin, set()).add(end)
    reach = {node: _reached(node, ahead) for node in ahead}
    groups = {
        frozenset(other for other in reach[node] if node in reach.get(other, ())) for node in ahead
    }
    return sorted(sorted(group) for group in groups if group)


def _reached(node: str, ahead: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [node]
    while waiting:
        fresh = ahead.get(waiting.pop(), set()) - seen
        seen |= fresh
        waiting += fresh
    return seen


# ---- the house -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> list[Arrow]:
    return [a for a in arrows(ROOT) if (a.importer, a.imported) not in STILL]


def test_everything_stands_on_one_floor() -> None:
    names = [name for names in FLOORS for name in names]
    assert len(names) == len(set(names))
    for module in modules_in(ROOT, FOLDERS):
        unit(module)


def test_no_import_runs_upward(found: list[Arrow]) -> None:
    wrong = upward(found)
    assert not wrong, "imports that run upward:\n" + "\n".join(map(str, wrong))


def test_no_packages_import_each_other(found: list[Arrow]) -> None:
    wrong = circles((unit(a.importer), unit(a.imported)) for a in found)
    assert not wrong, f"packages that import each other: {wrong}"


def test_no_files_import_each_other(found: list[Arrow]) -> None:
    wrong = circles((a.importer, a.imported) for a in found)
    assert not wrong, f"files that import each other: {wrong}"


def test_what_still_breaks_the_rules_is_not_mended_yet() -> None:
    gone = STILL - {(a.importer, a.imported) for a in arrows(ROOT)}
    assert not gone, f"mended: take it off STILL: {sorted(gone)}"


# ---- does the test see? --------------------------------------------------------------------------

LOW_AND_HIGH = (("low", "_C"), ("high",), ("",))
SIGHT = {
    "import": "import house.high",
    "from a module": "from house.high import thing",
    "from the package": "from house import high",
    "relative": "from .. import high",
    "relative, inside": "from ..high.file import thing",
    "in a function": "def f():\n    from house.high import thing",
    "for types": "if TYPE_CHECKING:\n    from house.high import thing",
    "a string": "importlib.import_module('house.high.file')",
    "the front door": "import house",
    "a public name": "from house import thing",
}


def house(root: Path, **files: str) -> list[Arrow]:
    """The arrows of a small tree: {path with __ for /: source}."""
    for name in ("__init__", "low____init__", "high____init__", "high__file"):
        files.setdefault(name, "")
    for name, source in files.items():
        stem = name if name == "__init__" else name.replace("____init__", "/__init__", 1)
        stem = stem if "__init__" in stem else stem.replace("__", "/")
        path = root / "house" / f"{stem}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return arrows(root, {"house": "house"})


@pytest.mark.parametrize("source", SIGHT.values(), ids=SIGHT)
def test_an_import_upward_is_seen(tmp_path: Path, source: str) -> None:
    (wrong,) = upward(house(tmp_path, low__file=source), LOW_AND_HIGH)
    line = source.count("\n") + 1
    assert str(wrong).startswith(f"house/low/file.py:{line}: house.low.file imports house")


@pytest.mark.parametrize("source", SIGHT.values(), ids=SIGHT)
def test_the_same_import_downward_is_none(tmp_path: Path, source: str) -> None:
    source = source.replace("high", "low")
    if "low" in source:
        assert not upward(house(tmp_path, high__file=source), LOW_AND_HIGH)


def test_words_about_a_module_and_other_libraries_are_no_imports(tmp_path: Path) -> None:
    source = '"""Uses house.high."""\nimport numpy\nname = "house"\nhigh = f(house_high=1)'
    assert house(tmp_path, low__file=source) == []


def test_circles_are_seen(tmp_path: Path) -> None:
    found = house(
        tmp_path, high__a="from house.high import b", high__b="def f():\n    import house.high.c",
        high__c="from .a import x", high__d="from house.high import a",
    )  # fmt: skip
    assert circles((a.importer, a.imported) for a in found) == [
        ["house.high.a", "house.high.b", "house.high.c"]
    ]
    assert circles([("a", "b"), ("b", "c"), ("c", "d")]) == []
