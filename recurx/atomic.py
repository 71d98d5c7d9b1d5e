"""Files that appear under their names whole or not at all.

One is written in a folder of its own beside its name, flushed to the disk, then renamed: a kill at
any moment leaves the old file or the new one. A folder, because safetensors writes temporary files
of its own, under names that nobody could tell from others' (`.tmpK6jeB9`) to remove them later.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the name `path` when the block ends without an error.

    It has the permissions of the file it replaces, else those of any new file of this process
    (what safetensors writes, only its owner can read).
    """
    beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        plain, new = beside / "plain", beside / "new"
        plain.touch()
        like = path if path.exists() else plain
        yield new
        with new.open("rb") as written:
            os.fsync(written.fileno())
        new.chmod(stat.S_IMODE(like.stat().st_mode))
        os.replace(new, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; an existing one is replaced."""
    from safetensors.torch import save_file

    with replacing(path) as new:
        save_file(dict(tensors), new, metadata=dict(metadata))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, and the folders it lies in; an existing one is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new:
        new.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def sweep(path: Path) -> None:
    """Remove what writers of `path` that were killed left beside it. Nobody may write it now."""
    for left in path.parent.glob(f".{path.name}.*"):
        shutil.rmtree(left, ignore_errors=True)
