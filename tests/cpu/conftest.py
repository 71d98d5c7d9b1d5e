"""Backends over each instruction set."""

from __future__ import annotations

import pytest

from recurx.backends import cpu
from tests.cpu import build


@pytest.fixture(scope="session")
def emulated() -> cpu.Cpu:
    """The backend over the emulated build."""
    try:
        return cpu.Cpu(build.load(build.module()))
    except build.native_tools.NotFound as missing:
        pytest.skip(f"cannot build the emulated engines: {missing}")


@pytest.fixture(params=build.ISAS)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> cpu.Cpu:
    """The backend with one instruction set: the real one if this machine has it, else emulated."""
    monkeypatch.setenv("RECURX_CPU_ISA", request.param)
    if cpu.BACKEND.why_unavailable() is None:
        return cpu.BACKEND
    return request.getfixturevalue("emulated")
