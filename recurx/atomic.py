"""Writing a safetensors file so that it appears under its name whole or not at all.

It is written in a folder of its own beside its name, flushed to the disk, then renamed: a kill at
any moment leaves the old file or the new one. A folder, because safetensors writes temporary files
of its own, under names that nobody could tell from others' (`.tmpK6jeB9`) to remove them later.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` to `path`; an existing file is replaced."""
    beside = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        temporary = os.path.join(beside, "new")
        save_file(dict(tensors), temporary, metadata=dict(metadata))
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def sweep(path: Path) -> None:
    """Remove what writers of `path` that were killed left beside it. Nobody may write it now."""
    for left in path.parent.glob(f".{path.name}.*"):
        shutil.rmtree(left, ignore_errors=True)
