"""Ctrl-C in a solve by the engine, see tests/alone.py."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from test_on_cpu import by_the_loop, differences, heavy, make, puzzles
from test_on_cpu import two_threads as two_threads

import recurx


def test_ctrl_c_ends_a_solve_within_a_second():
    model, batch, rules = heavy()
    pressed = []

    def press():
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.7, press)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        recurx.solve(model, batch, **rules)
    assert time.monotonic() - pressed[0] < 1.0 + 4.0  # a busy machine: seconds, not minutes
    assert not differences(
        recurx.solve(make(), puzzles(), 3), by_the_loop(make(), puzzles(), max_steps=3)
    )
