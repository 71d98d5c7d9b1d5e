"""What a fork must not copy half done: locks that other threads hold, and their imports.

Only the thread that forks goes on in the child: nobody there would release or end them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable
from importlib import _bootstrap  # type: ignore[attr-defined]
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE = 10.0  # seconds that a fork waits for imports


def fork_lock() -> Any:
    """A reentrant lock, free in a forked child. What it guards must be sound between any two
    statements: the child may find it as another thread was about to change it."""
    lock = threading.RLock()
    os.register_at_fork(after_in_child=lock._at_fork_reinit)  # type: ignore[attr-defined]
    return lock


class lazy(functools.cached_property[T]):
    """`functools.cached_property` without the lock that it has before Python 3.12."""

    def __init__(self, func: Callable[[Any], T]) -> None:
        super().__init__(func)
        self.lock: Any = contextlib.nullcontext()


def wait_for_imports() -> None:
    """Until no other thread imports a module of recurx, by the locks of Python's importer."""
    here, end = (None, threading.get_ident()), time.monotonic() + PATIENCE
    while time.monotonic() < end:
        locks = dict(getattr(_bootstrap, "_module_locks", {})).items()
        ours = [ref() for name, ref in locks if name.split(".")[0] == __package__]
        if all(getattr(lock, "owner", None) in here for lock in ours):
            break
        time.sleep(0.001)
