"""Short measurements: these tests look at what is attributed, not at how fast the machine is."""

from __future__ import annotations

import pytest

from recurx import measure


@pytest.fixture(autouse=True)
def _short_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    monkeypatch.setattr(measure, "COPY_BYTES", {"cpu": 1 << 18})
    monkeypatch.setattr(measure, "LARGE", {"cpu": 64})
