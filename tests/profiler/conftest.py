"""Short measurements: these tests look at what is attributed, not at how fast the machine is."""

from __future__ import annotations

import pytest

from recurx.profiler import ceilings


@pytest.fixture(autouse=True)
def _short_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "LIMIT", 0.0)
    monkeypatch.setattr(ceilings, "COPY_VALUES", 1 << 16)
    monkeypatch.setattr(ceilings, "PRODUCT_ROWS", {"cpu": 64})
