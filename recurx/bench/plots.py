"""Plots of result files, PNG and SVG, readable on light and on dark pages.

The background is transparent; text and axes are one grey with about equal contrast to white and to
a dark page, colours are mid-tones that colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recurx.bench.report import best_ours, by_device, case_order, newest_rows, times
from recurx.bench.results import Result
from recurx.errors import RecurxError

INK = "#737b85"  # 4.3 : 1 against white, 4.4 : 1 against #0d1117
FASTER, SLOWER = "#2a8fbd", "#c4682b"  # recurx wins, recurx loses
PAGES = {"light": "#ffffff", "dark": "#0d1117"}


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2, relative luminance)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def speedups(results: Sequence[Result]) -> list[tuple[str, float, float, float]]:
    """(label, ratio, low, high) of every PyTorch row against recurx's fastest of the same dtype.

    Ratios are times: 2 means that PyTorch takes twice as long. Low and high are from p20 and p80.
    """
    newest = newest_rows(results)
    groups: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for key, (row, _, _) in newest.items():
        groups.setdefault((key.case, key.mode, key.batch), {})[key.variant] = row
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
    try:
        import matplotlib
    except ImportError as error:
        raise RecurxError(
            "bench report: plots need matplotlib: pip install 'recurx[plot]', or --no-plots."
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for device, of_device in by_device(results).items():
        bars = speedups(of_device)
        if not bars:
            continue
        style = {
            "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
            "ytick.color": INK, "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "recurx",
        }  # fmt: skip
        with pyplot.rc_context(style):
            figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.24 * len(bars)))
            _bars(axes, bars)
            axes.set_title(f"{device}, {of_device[-1].date[:10]}", loc="left", fontsize=9)
            figure.tight_layout()
            stem = "speed-" + "".join(c if c.isalnum() else "-" for c in device.lower()).strip("-")
            while "--" in stem:
                stem = stem.replace("--", "-")
            for kind in ("png", "svg"):
                path = folder / f"{stem}.{kind}"
                # No date in the file: the same figures give the same bytes.
                metadata = {"Date": None} if kind == "svg" else None
                figure.savefig(path, transparent=True, dpi=160, metadata=metadata)
                written.append(path)
            pyplot.close(figure)
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
    axes.set_xlabel("time of PyTorch / time of recurx, same dtype; left of 1: recurx is slower")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
