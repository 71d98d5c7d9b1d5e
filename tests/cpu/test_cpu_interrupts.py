"""Interrupted calls of the CPU engine, see interrupts.py."""

from __future__ import annotations

from tests import alone


def test_interrupts() -> None:
    alone.passes("cpu/interrupts.py")
