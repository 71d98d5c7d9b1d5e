"""Where commands of the workshop write."""

from __future__ import annotations

import os
from pathlib import Path

from recurx.errors import InvalidArgument


def check_writable(*paths: str | Path | None) -> None:
    """Refuse what no file could be written to, before minutes are spent for it.

    Raises:
        InvalidArgument: a path is a folder, in no folder, or in one without permission.
    """
    for path in (Path(path) for path in paths if path):
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            why = "is a folder" if path.is_dir() else f"no folder {path.parent} that can be written"
            raise InvalidArgument(f"{path}: expected a file to write, got: {why}.")
