"""A lock between processes that fill a cache of compiled things."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other process or thread is: it waits, and then finds what this one made."""
    import fcntl  # here, for a system without it skips the tests that compile

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
