"""Tables for documents, from result files. Rows where recurx loses are shown like the others.

`markdown` writes everything (docs/benchmarks.md), `ratios` one row a machine and case (README.md).
A document says by a pair of markers which of the two it holds; `fill_in` replaces what is between.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from recurx.bench import quantities, reckoning, scaling
from recurx.bench.cases import CASES, DTYPES, MODES
from recurx.bench.predict import predict
from recurx.bench.provenance import ROOT
from recurx.bench.results import Key, Result
from recurx.errors import InvalidArgument

BEGIN, END = "<!-- bench:begin", "<!-- bench:end -->"
RATIOS_BEGIN, RATIOS_END = "<!-- ratios:begin", "<!-- ratios:end -->"
RECKONED_BEGIN, RECKONED_END = "<!-- reckoned:begin", "<!-- reckoned:end -->"
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
    parts.append(scaling.report())
    return "\n\n".join(part for part in parts if part)


def _heading(device: str, sources: list[Result]) -> str:
    facts = sources[-1].facts
    flags = ", ".join(facts["cpu"]["flags"])
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
    value = _figure(row["puzzles_per_s"] if mode == "solve" else row["p50_ms"])
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


def _figure(value: float, digits: int = 3) -> str:
    """`digits` significant digits without an exponent: 1543, 17.1, 0.0123."""
    if value == 0 or value >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    return f"{value:.6f}".rstrip("0") if "e" in text else text


# ---- ratios --------------------------------------------------------------------------------------

NAMES = {"step": "step", "train": "training step", "solve": "solving"}  # of columns


def ratios(results: Sequence[Result]) -> str:
    """One row a machine and case: how many times recurx's time the fastest other way takes.

    A bf16 row is compared with the fastest in bf16 or fp32: where bf16 has no instructions, PyTorch
    is faster in fp32, and that is what a user would run.

    Raises:
        InvalidArgument: no results.
    """
    if not results:
        raise InvalidArgument("bench report: no result file. Measure: python -m recurx bench run.")
    cells: dict[tuple[str, str], dict[tuple[str, str], list[str]]] = {}
    for device, of_device in by_device(results).items():
        groups = grouped(newest_rows(of_device))
        for case, mode, batch in sorted(groups, key=lambda g: (case_order(g[0]), g[2])):
            for dtype in DTYPES:
                found = _ratio(groups[case, mode, batch], dtype)
                if found:
                    row = cells.setdefault((device, case), {})
                    row.setdefault((mode, dtype), []).append(f"{found} (B={batch})")
    used = {column for row in cells.values() for column in row}
    columns = [(m, d) for m in MODES for d in ("fp32", "bf16") if (m, d) in used]
    heads = ["machine", "case", *(f"{NAMES[mode]}, {dtype}" for mode, dtype in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for (device, case), row in cells.items():
        name = device.replace("(R)", "").replace(" Processor", "")
        texts = [", ".join(row.get(column, [NONE])) for column in columns]
        lines.append("| " + " | ".join([name, case, *texts]) + " |")
    return "\n".join(lines)


def _ratio(rows: dict[str, Row], dtype: str) -> str:
    """The ratio, and which way it is against; "" if one of the two has no time."""
    ours = best_ours(rows, dtype)
    theirs = [
        row for row in rows.values()
        if not row["ours"] and row["status"] == "timed" and row["dtype"] in ("fp32", dtype)
    ]  # fmt: skip
    if ours is None or not theirs:
        return ""
    best = min(theirs, key=lambda row: row["p50_ms"])
    name = best["engine"] if best["dtype"] == dtype else f"{best['engine']} {best['dtype']}"
    return f"**{times(best['p50_ms'] / ours['p50_ms'])}** {name}"


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
        spread = f"{_figure(row['p20_ms'])}-{_figure(row['p80_ms'])}"
        name = f"{key.case} {key.mode}, {key.variant.removeprefix('recurx-').replace('/', ' ')}"
        cells = [
            name, str(key.batch), spread,
            _optional(row.get("tflops"), lambda v: _figure(1e3 * v)),
            _optional(row.get("of_peak"), lambda v: f"{v:.0%}"),
            _optional(row.get("of_floor"), lambda v: f"{v:.0%}"),
            _optional(row.get("predicted_ms"), _figure),
            _optional(row.get("launches"), str),
            _optional(row.get("peak_mib"), _figure),
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


# ---- into a file ---------------------------------------------------------------------------------


def fill_in(text: str, results: Sequence[Result], where: str) -> str:
    """`text` with all tables between its markers made anew: `markdown`, `ratios`, what is reckoned
    for GPUs, or several of them.

    Raises:
        InvalidArgument: it has no markers, has them twice, or in the wrong order.
    """
    tables = {(BEGIN, END): markdown, (RATIOS_BEGIN, RATIOS_END): ratios}
    tables[RECKONED_BEGIN, RECKONED_END] = lambda _: reckoning.table()
    present = [pair for pair in tables if pair[0] in text or pair[1] in text]
    if not present:
        raise InvalidArgument(
            f"bench report: {where} needs one line '{BEGIN} -->' and after it one '{END}' for all "
            f"tables, or '{RATIOS_BEGIN} -->' and '{RATIOS_END}' for the table of ratios."
        )
    for pair in present:
        text = replace_between_markers(text, tables[pair](results), where, *pair)
    return text


def replace_between_markers(
    text: str, generated: str, where: str, begin: str = BEGIN, end: str = END
) -> str:
    """`text` with what lies between two markers replaced.

    Raises:
        InvalidArgument: the markers are missing, twice there, or in the wrong order.
    """
    first, last = text.find(begin), text.find(end)
    if text.count(begin) != 1 or text.count(end) != 1 or last < first:
        raise InvalidArgument(
            f"bench report: {where} needs one line '{begin} -->' and after it one '{end}'."
        )
    head_end = text.index("-->", first) + 3
    return f"{text[:head_end]}\n{generated}\n{text[last:]}"
