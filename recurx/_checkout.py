"""What an installer would do, for a source checkout that nobody installed.

There the Triton kernels lie beside this package (`kernels/`), a wheel has them inside it; and no
metadata names the entry points, which `pyproject.toml` does. A finder for these two alone, because
putting the checkout's root on `recurx.__path__` would also make `recurx.tests` and `recurx.setup`
importable.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels"
NAME = "recurx-checkout"  # no installed distribution is called so
ENTRY_POINTS = re.compile(r"^\[project\.entry-points\.(.+)\]\n((?:.+\n)*)", re.MULTILINE)


class BesideThePackage(MetaPathFinder):
    """Finds `recurx.kernels`, whose submodules are then found the ordinary way; and metadata."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname != "recurx.kernels":
            return None
        return importlib.util.spec_from_file_location(
            fullname, KERNELS / "__init__.py", submodule_search_locations=[str(KERNELS)]
        )

    def find_distributions(self, context: Any) -> Iterator[Any]:
        """For `importlib.metadata`, which costs time to import and is asked for tasks alone."""
        from importlib.metadata import Distribution

        class OfTheCheckout(Distribution):
            def read_text(self, filename: str) -> str | None:
                known = {"METADATA": f"Name: {NAME}\nVersion: 0\n", "entry_points.txt": entries()}
                return known.get(filename)

            def locate_file(self, path: Any) -> Path:
                return ROOT / path

        if context.name in (None, NAME):
            yield OfTheCheckout()


def entries() -> str:
    """The entry points of pyproject.toml, as installers write them."""
    project = ROOT / "pyproject.toml"
    text = project.read_text(encoding="utf-8") if project.exists() else ""
    return "\n".join(
        f"[{group}]\n{lines}" for group, lines in ENTRY_POINTS.findall(text.replace('"', ""))
    )


def install() -> None:
    """Called once by `recurx/__init__.py`; does nothing in an installed package."""
    if not Path(__file__).with_name("kernels").is_dir():
        # In front: an editable install of another checkout knows these names too.
        sys.meta_path.insert(0, BesideThePackage())
