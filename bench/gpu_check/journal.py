"""Lines as they become known, and the result file that they make. Standard library alone."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PATH, PHASE = "RECURX_GPU_CHECK_JOURNAL", "RECURX_GPU_CHECK_PHASE"  # environment of a phase
ROOT = Path(__file__).resolve().parents[2]
SCHEMA = 2  # of recurx/bench/results.py
Line = dict[str, Any]


def emit(kind: str, **fields: Any) -> None:
    """Append one line, on the disk when this returns; without a journal it is only printed."""
    line = {"phase": os.environ.get(PHASE, ""), "kind": kind, "at": round(time.time(), 3), **fields}
    text = json.dumps(line, default=str)
    print(text, flush=True)
    if os.environ.get(PATH):
        append(Path(os.environ[PATH]), line)


def append(path: Path, line: Line) -> None:
    """One write, so that lines of several processes do not mix."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        # The newline in front ends what a killed process may have left of its last line.
        os.write(file, b"\n" + json.dumps(line, default=str).encode() + b"\n")
        os.fsync(file)
    finally:
        os.close(file)


def read(path: Path) -> list[Line]:
    """The whole lines; a torn one is left out."""
    found = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "kind" in line:
            found.append(line)
    return found


def document(lines: Iterable[Line]) -> dict[str, Any]:
    """The result file of these lines."""
    provenance: dict[str, Any] = {}
    groups: dict[tuple[str, str, int], dict[str, Any]] = {}
    phases: dict[str, dict[str, Any]] = {}
    planned: list[str] = []
    for line in lines:
        kind, phase = line["kind"], line["phase"]
        said = {k: v for k, v in line.items() if k not in ("kind", "phase", "at")}
        if kind == "call":
            planned = said.pop("planned")
            provenance |= said
        elif kind == "provenance":
            provenance = said | {k: v for k, v in provenance.items() if v is not None}
        elif kind in ("group", "row"):
            key = said["case"], said["mode"], said["batch"]
            group = groups.setdefault(key, dict(zip(("case", "mode", "batch"), key, strict=True)))
            rows = group.setdefault("rows", [])
            if kind == "group":  # of several processes the first has the ceilings
                group |= {k: v for k, v in said.items() if v not in ({}, None)}
            else:
                rows[:] = [r for r in rows if r["variant"] != said["row"]["variant"]]
                rows.append(said["row"])
        else:
            entry = phases.setdefault(phase, {"name": phase, "status": "not finished"})
            if kind in ("start", "end"):
                entry |= said
            else:
                entry.setdefault("lines", []).append({"kind": kind, **said})
    for name in planned:
        phases.setdefault(name, {"name": name, "status": "not started"})
    unfinished = [p for p in phases.values() if p["status"] in ("not started", "not finished")]
    return {
        "schema": SCHEMA, "status": "partial" if unfinished or not planned else "complete",
        "provenance": provenance, "groups": list(groups.values()), "phases": list(phases.values()),
    }  # fmt: skip


def write(path: Path, made: dict[str, Any]) -> None:
    """The file has its old or its new content at any moment. It does not say where things lay."""
    text = json.dumps(made, indent=1)
    places = {str(path.parent): "OUTDIR", sys.executable: "python", f"{ROOT}/": "", str(ROOT): "."}
    for place, name in places.items():
        text = text.replace(place, name)
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text + "\n")
    fresh.replace(path)
