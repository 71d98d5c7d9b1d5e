"""Lets `import recurx.kernels` work in a source checkout that nobody installed.

There the Triton kernels lie beside this package (`kernels/`), a wheel has them inside it. A finder
for that one name, because putting the checkout's root on `recurx.__path__` would also make
`recurx.tests` and `recurx.setup` importable.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / "kernels"


class KernelsBesideThePackage(MetaPathFinder):
    """Finds `recurx.kernels`; its submodules are then found the ordinary way."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname != "recurx.kernels":
            return None
        return importlib.util.spec_from_file_location(
            fullname, KERNELS / "__init__.py", submodule_search_locations=[str(KERNELS)]
        )


def install() -> None:
    """Called once by `recurx/__init__.py`; does nothing in an installed package."""
    if not Path(__file__).with_name("kernels").is_dir():
        # In front: an editable install of another checkout knows this name too.
        sys.meta_path.insert(0, KernelsBesideThePackage())
