"""All tables (docs/benchmarks.md) from result files. Rows where recurx loses are shown like others.

Beside this, `ratios.py` has one row a machine and case (README.md), and `pages.py` puts either into
a document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from recurx.bench import quantities, scaling
from recurx.bench.cases import CASES, MODES
from recurx.bench.predict import predict
from recurx.bench.provenance import ROOT
from recurx.bench.results import Key, Result
from recurx.errors import InvalidArgument

UNITS = {
    "step": "Milliseconds of a supervision step",
    "train": "Milliseconds of a training step",
    "solve": "Puzzles per second",
}
NONE = "–"  # not measured
PROMISED = 0.25  # what the model of cost must reach on a CPU

Row = dict[str, Any]


def newest_rows(results: Sequence[Result]) -> dict[Key, tuple[Row, dict, Result]]:
    """{key: (row, its group, its result)}: the newest of each key; results come oldest first."""
    found: dict[Key, tuple[Row, dict, Result]] = {}
    for result in results:
        for group in result.groups:
            for row in group["rows"]:
                key = Key(group["case"], group["mode"], group["batch"], row["variant"])
                found[key] = (row, group, result)
    return found


def grouped(
    newest: dict[Key, tuple[Row, dict, Result]],
) -> dict[tuple[str, str, int], dict[str, Row]]:
    """{(case, mode, batch): {variant: row}}."""
    found: dict[tuple[str, str, int], dict[str, Row]] = {}
    for key, (row, _, _) in newest.items():
        found.setdefault((key.case, key.mode, key.batch), {})[key.variant] = row
    return found


def by_device(results: Iterable[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.device, []).append(result)
    return found


def markdown(results: Sequence[Result]) -> str:
    """All tables, device after device.

    Raises:
        InvalidArgument: no results.
    """
    if not results:
        raise InvalidArgument("bench report: no result file. Measure: python -m recurx bench run.")
    for result in results:  # by the rules and the model of today, whatever the file holds
        quantities.against_ceilings(result.document)
        predict(result.document)
    parts = []
    for device, of_device in by_device(results).items():
        newest = newest_rows(of_device)
        used = list(dict.fromkeys(id(result) for _, _, result in newest.values()))
        sources = [result for result in of_device if id(result) in used]
        parts.append(_heading(device, sources))
        for mode in MODES:
            keys = [key for key in newest if key.mode == mode]
            if keys:
                parts.append(_times(mode, keys, newest))
        ours = [key for key in newest if newest[key][0].get("ours")]
        parts.append(_reached(ours, newest))
        parts.append(_foretold(newest))
        parts.append(_reasons(newest))
    if not any(result.facts.get("gpu") for result in results):
        parts.append("Every case on a GPU: not measured.")
    parts.append(scaling.report())
    return "\n\n".join(part for part in parts if part)


def _heading(device: str, sources: list[Result]) -> str:
    facts = sources[-1].facts
    flags = ", ".join(facts["cpu"]["flags"])
    if engine := facts["cpu"].get("engine"):
        flags += f"; engine {engine}"
    versions = [f"{n} {facts[n]}" for n in ("torch", "triton") if facts.get(n)]
    lines = [f"**{device}** ({flags}); {', '.join(versions)}."]
    if any(result.facts.get("gpu") for result in sources):
        lines = [f"**{device}**; {', '.join(versions)}."]
    for result in sources:
        facts = result.facts
        commit = facts["commit"][:7] if facts["commit"] else "unknown"
        dirty = " with changes" if facts["dirty"] else ""
        partial = ", interrupted" if result.document["status"] == "partial" else ""
        lines.append(
            f"- {facts['date'][:10]}, commit {commit}{dirty}{partial}: `{facts['command']}`, "
            f"`{_shown(result.path)}`"
        )
    return "\n".join(lines)


def _shown(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name)


# ---- times ---------------------------------------------------------------------------------------


def _times(mode: str, keys: list[Key], newest: dict[Key, tuple[Row, dict, Result]]) -> str:
    variants = sorted({key.variant for key in keys}, key=_order)
    shapes = sorted({(key.case, key.batch) for key in keys}, key=lambda s: (case_order(s[0]), s[1]))
    heads = ["case", "B", *(f"{name.replace('/', ' ')}" for name in variants)]
    lines = [
        f"{UNITS[mode]}, median. The factor in brackets is against the fastest recurx of the same "
        "dtype.",
        "",
    ]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, batch in shapes:
        rows = {
            v: newest[Key(name, mode, batch, v)][0]
            for v in variants
            if Key(name, mode, batch, v) in newest
        }
        cells = [_cell(mode, v, rows) for v in variants]
        lines.append("| " + " | ".join([name, str(batch), *cells]) + " |")
    return "\n".join(lines)


def _order(variant: str) -> tuple[bool, bool, str]:
    engine, _, dtype = variant.partition("/")
    return not engine.startswith("recurx-"), dtype == "fp32", engine


def case_order(name: str) -> int:
    return list(CASES).index(name) if name in CASES else len(CASES)


def best_ours(rows: dict[str, Row], dtype: str) -> Row | None:
    """recurx's fastest timed row of a dtype."""
    ours = [
        row for row in rows.values()
        if row["ours"] and row["status"] == "timed" and row["dtype"] == dtype
    ]  # fmt: skip
    return min(ours, key=lambda row: row["p50_ms"], default=None)


def _cell(mode: str, variant: str, rows: dict[str, Row]) -> str:
    row = rows.get(variant)
    if row is None:
        return NONE
    if row["status"] != "timed":
        return str(row["status"])
    value = figure(row["puzzles_per_s"] if mode == "solve" else row["p50_ms"])
    exact = (
        f", {row['exact']:.0%} exact in {row['steps_mean']:.1f} steps" if mode == "solve" else ""
    )
    fastest = min(r["p50_ms"] for r in rows.values() if r["status"] == "timed")
    value = f"**{value}**" if row["p50_ms"] == fastest else value
    ours = best_ours(rows, row["dtype"])
    if row["ours"] or ours is None:
        return value + exact
    return f"{value} ({times(row['p50_ms'] / ours['p50_ms'])}){exact}"


def times(ratio: float) -> str:
    """1.16x, 9.0x, 26x: losses and small gains keep two digits behind the point."""
    return f"{ratio:.2f}x" if ratio < 2 else f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"


def figure(value: float, digits: int = 3) -> str:
    """`digits` significant digits without an exponent: 1543, 17.1, 0.0123."""
    if value == 0 or value >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    return f"{value:.6f}".rstrip("0") if "e" in text else text


# ---- what recurx reaches -------------------------------------------------------------------------


def _reached(keys: list[Key], newest: dict[Key, tuple[Row, dict, Result]]) -> str:
    heads = (
        "recurx", "B", "ms p20-p80", "GFLOP/s", "of peak", "of floor", "predicted ms", "launches",
        "peak MiB",
    )  # fmt: skip
    lines = [
        "What recurx reaches. *Of peak* compares with the fastest matrix product of the same run. "
        "*Of floor* compares the time with the least one that this product and the bandwidth of a "
        "copy allow. *Predicted* is what recurx's cost model says, and *peak MiB* is memory beyond "
        "the loaded model.",
        "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|",
    ]  # fmt: skip
    for key in sorted(keys, key=lambda k: (k.mode, case_order(k.case), k.batch, k.variant)):
        row = newest[key][0]
        if row["status"] != "timed":
            continue
        spread = f"{figure(row['p20_ms'])}-{figure(row['p80_ms'])}"
        name = f"{key.case} {key.mode}, {key.variant.removeprefix('recurx-').replace('/', ' ')}"
        cells = [
            name, str(key.batch), spread,
            _optional(row.get("tflops"), lambda v: figure(1e3 * v)),
            _optional(row.get("of_peak"), lambda v: f"{v:.0%}"),
            _optional(row.get("of_floor"), lambda v: f"{v:.0%}"),
            _optional(row.get("predicted_ms"), figure),
            _optional(row.get("launches"), str),
            _optional(row.get("peak_mib"), figure),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 4 else ""


def _foretold(newest: dict[Key, tuple[Row, dict, Result]]) -> str:
    """How well the model of cost knew the rows that it speaks of, baselines included."""
    ratios = {
        key: row["predicted_ms"] / row["p50_ms"]
        for key, (row, _, _) in newest.items()
        if row["status"] == "timed" and row.get("predicted_ms")
    }
    if not ratios:
        return ""
    off = {key: ratio for key, ratio in ratios.items() if abs(ratio - 1) > PROMISED}
    text = (
        f"The cost model is within {PROMISED:.0%} of the measured time in {len(ratios) - len(off)} "
        f"of {len(ratios)} rows, eager ones included"
    )
    listed = ", ".join(f"{key} ({times(ratio)})" for key, ratio in off.items())
    return f"{text}. Predicted over measured in the others: {listed}." if off else f"{text}."


def _optional(value: Any, text: Any) -> str:
    return NONE if value is None else str(text(value))


def _reasons(newest: dict[Key, tuple[Row, dict, Result]]) -> str:
    """Why rows have no time."""
    found = [
        f"- {key}: {row['status']}: {row['reason']}"
        for key, (row, _, _) in newest.items()
        if row["status"] != "timed"
    ]
    return "\n".join(["Not timed:", *found]) if found else ""
