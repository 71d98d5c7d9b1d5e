"""metrics.jsonl: one line of JSON an evaluation, never torn and never twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recurx import atomic


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one line; it needs a "step"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of later steps: a killed run made them after its last checkpoint, and the
    resumed one will make them again. A line that the kill cut short counts as too late.

    The file is replaced as a whole: a kill in here must not lose what it held.
    """
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    kept = "".join(f"{line}\n" for line in text.splitlines() if _step_of(line) <= step)
    if kept != text:
        with atomic.replacing(path) as new:
            new.write_text(kept, encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")
