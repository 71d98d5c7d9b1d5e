"""Ctrl-C and SIGTERM during a run: end it after the step in progress, then save."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class Interrupt:
    """The number of the signal that came, 0 before; a command ends with 128 more as exit code."""

    signal = 0


@contextlib.contextmanager
def interrupts() -> Iterator[Interrupt]:
    """What Ctrl-C or SIGTERM set instead of raising; a second one raises KeyboardInterrupt."""
    came = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield came  # only the main thread may handle signals
        return
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: object) -> None:
        if came.signal:
            raise KeyboardInterrupt
        came.signal = number

    for number in previous:
        signal.signal(number, handle)
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
