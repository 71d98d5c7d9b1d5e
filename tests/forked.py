"""Work in a forked child of a test's process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def begun(work: Callable[[], bool], patience: int = 30) -> int:
    """The pid of a child that ends by 0 if `work` returns True within `patience` seconds. An error
    ends it too: a child that left here would go on with the tests as a second worker."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(patience)
            code = 0 if work() else 1
        finally:
            os._exit(code)
    return pid


def in_child(work: Callable[[], bool], patience: int = 30) -> int:
    """The status of that child."""
    return os.waitpid(begun(work, patience), 0)[1]
