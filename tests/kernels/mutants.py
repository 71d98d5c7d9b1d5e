"""Kernel modules with a bug planted in their source, to show that the tests would find it."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

_numbers = itertools.count()


def planted(module: str, old: str, new: str, folder: Path) -> ModuleType:
    """`recurx.kernels.<module>` with `old`, which must occur, replaced by `new`.

    A real file, because Triton reads the source of its kernels.
    """
    original = importlib.import_module(f"recurx.kernels.{module}")
    source = Path(original.__file__).read_text()
    assert old in source, f"{module} has no {old!r}: adapt the planted bug"
    name = f"recurx.kernels.{module}_mutant{next(_numbers)}"
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(name, path)
    mutant = importlib.util.module_from_spec(spec)
    sys.modules[name] = mutant  # inspect and dataclasses look there
    try:
        spec.loader.exec_module(mutant)
    finally:
        del sys.modules[name]
    return mutant
