"""Kernel modules with a bug planted in their source, to show that the tests would find it."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

_numbers = itertools.count()


def planted(module: str, old: str, new: str, folder: Path, *more: tuple[str, str]) -> ModuleType:
    """`recurx.kernels.<module>` with `old`, which must occur, replaced by `new`; `more` likewise.

    A real file, because Triton reads the source of its kernels.
    """
    original = importlib.import_module(f"recurx.kernels.{module}")
    source = Path(original.__file__).read_text()
    for before, after in ((old, new), *more):
        assert before in source, f"{module} has no {before!r}: adapt the planted bug"
        source = source.replace(before, after)
    name = f"recurx.kernels.{module}_mutant{next(_numbers)}"
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    mutant = importlib.util.module_from_spec(spec)
    sys.modules[name] = mutant  # inspect and dataclasses look there
    try:
        spec.loader.exec_module(mutant)
    finally:
        del sys.modules[name]
    return mutant
