"""Forked children of a process that has threads, see forks.py."""

from __future__ import annotations

from tests import alone


def test_forks() -> None:
    alone.passes("process/forks.py")
