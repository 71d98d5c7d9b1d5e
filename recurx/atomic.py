"""Files that appear under their names whole or not at all.

One is written in a folder of its own beside its name, flushed to the disk, then renamed: a kill at
any moment leaves the old file or the new one. A folder, because safetensors writes temporary files
of its own, under names that nobody could tell from others' (`.tmpK6jeB9`) to remove them later.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from recurx.errors import RunFailed, SaveFailed

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def explained(path: Path, needed: int = 0) -> Iterator[None]:
    """Around the writing of `path`: an error of the system becomes `SaveFailed`, which says why.

    Args:
        needed: bytes of the file, if they are known.
    """
    try:
        yield
    except SaveFailed:
        raise
    except OSError as error:
        why = f"cannot write {path}: {error.strerror or error}."
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            there = next(folder for folder in path.absolute().parents if folder.is_dir())
            wants = f"It needs {needed:,} bytes beside the old file. " if needed else ""
            why += f" {wants}{shutil.disk_usage(there).free:,} bytes are free there."
        raise SaveFailed(f"{why} What was there before is unchanged.") from error


@contextmanager
def replacing(path: Path, needed: int = 0) -> Iterator[Path]:
    """Where to write a file that takes the name `path` when the block ends without an error.

    It has the permissions of the file it replaces, else those of any new file of this process
    (what safetensors writes, only its owner can read).

    Args:
        needed: bytes of the file, for the message if there is no room.

    Raises:
        SaveFailed: the system refuses (no room, no permission, ...).
    """
    with explained(path, needed):
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
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path, sum(tensor.nbytes for tensor in tensors.values())) as new:
        try:
            save_file(dict(tensors), new, metadata=dict(metadata))
        except SafetensorError as error:  # it writes by itself, and tells the system's error so
            code = re.search(r"(?:os error|code:) (\d+)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, and the folders it lies in; an existing one is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new:
        new.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def sweep(path: Path) -> None:
    """Remove what writers of `path` that were killed left beside it. Nobody may write it now."""
    for left in path.parent.glob(f".{path.name}.*"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of the file `path`, which names its holder. It ends with the process at latest.

    Where the file system has no locks (NFS without a lock daemon, say) it warns and goes on.

    Raises:
        RunFailed: somebody else holds it; the message says who.
        SaveFailed: the file cannot be made.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    with file:
        _lock(file, path.parent)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(file: IO[bytes], folder: Path) -> None:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(1000).decode(errors="replace").strip() or "another process"
        raise RunFailed(
            f"{folder} is in use by {holder}. Wait for it or stop it, or choose another folder."
        ) from None
    except (ImportError, OSError) as error:  # Windows, NFS
        why = f"{folder}: its file system has no locks ({error}; NFS?)"
        warnings.warn(f"{why}: nothing keeps a second run out of it.", stacklevel=2)
    with contextlib.suppress(OSError):  # on a full disk it is locked, and has no name
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
