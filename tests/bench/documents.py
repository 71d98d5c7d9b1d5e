"""Result documents made by hand, for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from recurx.bench import quantities, results
from recurx.bench.variants import Variant

CPU = {"model": "Some CPU", "family_model": "1/2", "cores": 2, "flags": ["avx2"]}


def row(variant: str, times_ms: list[float], **more) -> dict:
    engine, _, dtype = variant.partition("/")
    found = quantities.describe(Variant(engine, dtype))
    return found | quantities.timed([t / 1e3 for t in times_ms], 1) | more


def untimed(variant: str, status: str, reason: str) -> dict:
    engine, _, dtype = variant.partition("/")
    found = quantities.describe(Variant(engine, dtype))
    return found | {"status": status, "reason": reason}


def noisy(median: float, seed: int, rounds: int = 30, spread: float = 0.05) -> list[float]:
    """Times as a shared machine gives them: skewed, with a spread of 5 %."""
    rng = np.random.default_rng(seed)
    return list(median * np.exp(spread * rng.standard_normal(rounds)))


def document(rows: list[dict], case="trm-att", mode="step", batch=1, **provenance) -> dict:
    facts = {
        "date": "2026-01-02T03:04:05+00:00", "command": "python -m recurx bench run",
        "commit": "0123456789abcdef", "dirty": False, "device": "cpu", "cpu": CPU, "gpu": None,
        "threads": 2, "torch": "2.13.0",
    }  # fmt: skip
    group = {"case": case, "mode": mode, "batch": batch, "rows": rows}
    return {
        "schema": results.SCHEMA, "status": "complete", "provenance": facts | provenance,
        "groups": [group],
    }  # fmt: skip


def write(path: Path, made: dict) -> results.Result:
    path.write_text(json.dumps(made))
    return results.load(path)
