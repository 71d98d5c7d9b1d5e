"""README's tables: how many times recurx's time the other ways take, one row a machine and case."""

from __future__ import annotations

from collections.abc import Sequence

from recurx.bench.cases import DTYPES, MODES
from recurx.bench.report import (
    NONE,
    Row,
    best_ours,
    by_device,
    case_order,
    figure,
    grouped,
    newest_rows,
    times,
)  # fmt: skip
from recurx.bench.results import Result
from recurx.bench.variants import OURS, YARDSTICK
from recurx.errors import InvalidArgument

NOT_MEASURED = "GPUs: not measured."
# The front page has no room for cases that fare as trm-att and small-64 do; docs/benchmarks.md has.
LEFT_OUT = ("trm-mlp", "small-256")
NAMES = {"step": "step", "train": "training step", "solve": "solving"}  # of columns


def ratios(results: Sequence[Result]) -> str:
    """The table of processors, then that of GPUs.

    Raises:
        InvalidArgument: no results.
    """
    if not results:
        raise InvalidArgument("bench report: no result file. Measure: python -m recurx bench run.")
    of_gpus = [result for result in results if result.facts.get("gpu")]
    of_cpus = [result for result in results if result not in of_gpus]
    tables = [cpu_table(of_cpus)] if of_cpus else []
    return "\n\n".join([*tables, gpu_table(of_gpus)])


def cpu_table(results: Sequence[Result]) -> str:
    """One row a machine and case, but for LEFT_OUT: how many times recurx's time the fastest other
    way takes.

    A bf16 row is compared with the fastest in bf16 or fp32: where bf16 has no instructions, PyTorch
    is faster in fp32, and that is what a user would run.
    """
    cells: dict[tuple[str, str], dict[tuple[str, str], list[str]]] = {}
    for device, of_device in by_device(results).items():
        groups = grouped(newest_rows(of_device))
        for case, mode, batch in sorted(groups, key=lambda g: (case_order(g[0]), g[2])):
            for dtype in DTYPES:
                found = _ratio(groups[case, mode, batch], dtype)
                if found and case not in LEFT_OUT:
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


# ---- GPUs ----------------------------------------------------------------------------------------


def gpu_table(results: Sequence[Result]) -> str:
    """One row a GPU, case and mode, or that nothing was measured.

    recurx's time is that of `auto`, which is what a user gets, where it was measured, else that of
    the fastest family of kernels.
    """
    lines = []
    for device, of_device in by_device(results).items():
        groups = grouped(newest_rows(of_device))
        rows: dict[tuple[str, str], list[tuple[int, dict[str, Row]]]] = {}
        for case, mode, batch in sorted(groups, key=lambda g: (case_order(g[0]), g[1:])):
            rows.setdefault((case, mode), []).append((batch, groups[case, mode, batch]))
        for (case, mode), of_batches in rows.items():
            cells = [_cells(*one) for one in of_batches]
            texts = [", ".join(filter(None, column)) for column in zip(*cells, strict=True)]
            if any(texts):
                name = f"{case}, {NAMES[mode]}"
                lines.append(" | ".join([f"| {device}", name, *(t or NONE for t in texts)]))
    if not lines:
        return NOT_MEASURED
    heads = "| GPU, bf16 | case | recurx, ms | against eager | against PyTorch's fastest way |"
    return "\n".join([heads, "|---" * 5 + "|", *(f"{line} |" for line in lines)])


def _cells(batch: int, rows: dict[str, Row]) -> tuple[str, str, str]:
    """recurx's time, and both ratios; "" for what was not measured."""
    timed = {v: row for v, row in rows.items() if row["status"] == "timed"}
    timed = {v: row for v, row in timed.items() if row["dtype"] == "bf16"}
    ours = timed.get(f"{OURS}auto/bf16") or best_ours(timed, "bf16")
    if ours is None:
        return "", "", ""
    theirs = [row for row in timed.values() if not row["ours"]]
    best = min(theirs, key=lambda row: row["p50_ms"], default=None)
    eager = timed.get(f"{YARDSTICK}/bf16")

    def ratio(row: Row | None, name: str = "") -> str:
        if row is None:
            return ""
        return f"**{times(row['p50_ms'] / ours['p50_ms'])}**{name} (B={batch})"

    by_best = ratio(best, f" {best['engine']}") if best else ""
    return f"{figure(ours['p50_ms'])} (B={batch})", ratio(eager), by_best
