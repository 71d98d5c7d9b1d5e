"""Result files: one JSON document a run, written whole or not at all.

    {"schema": 2, "status": "complete" | "partial", "provenance": {...}, "groups": [group, ...]}
    group   case, mode, batch, tokens, hidden, calls, flops, bytes, cache, interleaved, ceilings,
            rows: [row, ...]
    row     variant, engine, backend, dtype, ours, status; timed rows have p20_ms, p50_ms, p80_ms,
            rounds, repeats, times_ms (one a round; [] where only the quantiles were kept)

A row that is not "timed" (wrong, refused, failed) has no time but a reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recurx.bench.provenance import device_name
from recurx.errors import RecurxError

SCHEMA = 2
STATUSES = ("timed", "wrong", "refused", "failed")
GROUP_KEYS = ("case", "mode", "batch", "rows")
TIMED_KEYS = ("p20_ms", "p50_ms", "p80_ms", "rounds", "times_ms")


class BadResult(RecurxError, ValueError):
    """A file is no result of this suite; the message says what is wrong with it."""


@dataclass(frozen=True, order=True)
class Key:
    """What a row measures, apart from how it came out."""

    case: str
    mode: str
    batch: int
    variant: str

    def __str__(self) -> str:
        return f"{self.case} {self.mode} B={self.batch} {self.variant}"


@dataclass(frozen=True)
class Result:
    """One file."""

    path: Path
    document: dict[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = self.document["provenance"]
        return found

    @property
    def groups(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.document["groups"]
        return found

    @property
    def device(self) -> str:
        return device_name(self.facts)

    @property
    def date(self) -> str:
        return str(self.facts["date"])

    def rows(self) -> Iterator[tuple[Key, dict[str, Any]]]:
        """Every row with its key."""
        for group in self.groups:
            for row in group["rows"]:
                yield Key(group["case"], group["mode"], group["batch"], row["variant"]), row

    def timed(self) -> dict[Key, dict[str, Any]]:
        return {key: row for key, row in self.rows() if row["status"] == "timed"}


def problems(document: Any) -> list[str]:
    """What is wrong with a document, one sentence each; [] if nothing."""
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        got = document.get("schema") if isinstance(document, dict) else type(document).__name__
        return [f"expected schema {SCHEMA}, got {got!r}"]
    found = []
    if document.get("status") not in ("complete", "partial"):
        found.append(f"status: expected complete or partial, got {document.get('status')!r}")
    for name in ("date", "command", "commit", "dirty", "device", "cpu", "threads", "torch"):
        if name not in document.get("provenance", {}):
            found.append(f"provenance.{name} is missing")
    for number, group in enumerate(document.get("groups", [])):
        found += [f"groups[{number}].{key} is missing" for key in GROUP_KEYS if key not in group]
        for row in group.get("rows", []):
            where = f"groups[{number}] row {row.get('variant')!r}"
            if row.get("status") not in STATUSES:
                found.append(f"{where}: status: expected one of {STATUSES}")
            elif row["status"] == "timed":
                found += [f"{where}: {key} is missing" for key in TIMED_KEYS if key not in row]
            else:
                found += [f"{where}: has a time" for key in TIMED_KEYS[:3] if key in row]
                found += [] if row.get("reason") else [f"{where}: has no reason"]
    return found


def load(path: str | Path) -> Result:
    """The result in a file.

    Raises:
        BadResult: no JSON, another schema, or a broken document.
        OSError: no such file.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadResult(f"{path}: not JSON: {error}") from error
    try:
        wrong = problems(document)
    except (AttributeError, TypeError, KeyError) as error:  # a list where an object belongs
        raise BadResult(f"{path}: no result of this suite: {error}") from error
    if wrong:
        raise BadResult(f"{path}: {'; '.join(wrong[:5])}")
    return Result(path, document)


def load_folder(folder: Path) -> list[Result]:
    """The results of a folder, oldest first; other JSON files in it are left alone."""
    found = []
    for path in sorted(folder.glob("*.json")):
        with suppress(BadResult):
            found.append(load(path))
    return sorted(found, key=lambda result: result.date)
