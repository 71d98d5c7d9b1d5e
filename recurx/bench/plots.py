"""Plots of result files, PNG and SVG, readable on light and on dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recurx.bench import drawing
from recurx.bench.drawing import BLUE, INK, ORANGE, PAGES, contrast
from recurx.bench.report import best_ours, by_device, case_order, grouped, newest_rows, times
from recurx.bench.results import Result

__all__ = ["FASTER", "INK", "PAGES", "SLOWER", "contrast", "draw", "speedups"]

FASTER, SLOWER = BLUE, ORANGE  # recurx wins, recurx loses


def speedups(results: Sequence[Result]) -> list[tuple[str, float, float, float]]:
    """(label, ratio, low, high) of every PyTorch row against recurx's fastest of the same dtype.

    Ratios are times: 2 means that PyTorch takes twice as long. Low and high are from p20 and p80.
    """
    groups = grouped(newest_rows(results))
    found = []
    for case, mode, batch in sorted(groups, key=lambda g: (g[1], case_order(g[0]), g[2])):
        rows = groups[case, mode, batch]
        for variant, row in sorted(rows.items()):
            ours = best_ours(rows, row["dtype"])
            if row["ours"] or row["status"] != "timed" or ours is None:
                continue
            label = f"{case} {mode} B={batch}, {variant.replace('/', ' ')}"
            ratio = row["p50_ms"] / ours["p50_ms"]
            low, high = row["p20_ms"] / ours["p80_ms"], row["p80_ms"] / ours["p20_ms"]
            found.append((label, ratio, min(low, ratio), max(high, ratio)))
    return found


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """One picture a device, as PNG and SVG: how many times recurx's time PyTorch takes.

    Raises:
        RecurxError: matplotlib is not installed.
    """
    plt = drawing.pyplot("bench report", "--no-plots")
    written = []
    for device, of_device in by_device(results).items():
        bars = speedups(of_device)
        if not bars:
            continue
        title = f"{device}, {of_device[-1].date[:10]}"
        stem = "speed-" + "".join(c if c.isalnum() else "-" for c in device.lower()).strip("-")
        while "--" in stem:
            stem = stem.replace("--", "-")

        def fill(figure: Any, bars: Any = bars, title: str = title) -> None:
            axes = figure.add_subplot()
            _bars(axes, bars)
            axes.set_title(title, loc="left", fontsize=9)

        written += drawing.save(plt, folder / stem, (8, 1.2 + 0.24 * len(bars)), fill)
    return written


def _bars(axes: Any, bars: list[tuple[str, float, float, float]]) -> None:
    labels = [bar[0] for bar in bars]
    ratios = [bar[1] for bar in bars]
    errors = [[r - low for _, r, low, _ in bars], [high - r for _, r, _, high in bars]]
    colours = [FASTER if ratio >= 1 else SLOWER for ratio in ratios]
    places = range(len(bars))
    axes.barh(
        places, [r - 1 for r in ratios], left=1, color=colours, height=0.7, xerr=errors,
        error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2},
    )  # fmt: skip
    axes.set_xscale("log")
    low, high = min(0.5, *(bar[2] for bar in bars)), max(2.0, *(bar[3] for bar in bars))
    axes.set_xlim(0.9 * low, 1.6 * high)
    axes.axvline(1, color=INK, linewidth=1)
    for place, (_, ratio, _, top) in zip(places, bars, strict=True):
        axes.text(top * 1.04, place, times(ratio), va="center", color=INK)
    axes.set_yticks(list(places), labels)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xlabel("time of the other / time of recurx, same dtype; left of 1: recurx is slower")
