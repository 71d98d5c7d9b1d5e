"""Shows what a budget of steps or time buys: as tables, and as pictures of accuracy against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recurx.bench import drawing
from recurx.bench.budgets import Exit, Point, fastest_at_equal_accuracy
from recurx.bench.drawing import COLOURS, INK, pyplot
from recurx.errors import InvalidArgument

SUFFIXES = (".png", ".svg")
Table = tuple[str, list[str], list[list[str]]]  # title, columns, rows


def points_table(points: Sequence[Point], count: int) -> Table:
    """What each budget came to, with `count` puzzles."""
    rows = [
        [f"{p.max_steps}", f"{p.rollouts}", f"{p.exact:.1%}", f"{p.steps_mean:.1f}",
         f"{1000 * p.seconds:.2f} ms"]
        for p in points
    ]  # fmt: skip
    columns = ["steps at most", "rollouts", "exact", "steps taken", "time a puzzle"]
    return f"What a budget buys, {count} puzzles", columns, rows


def exits_table(exits: Sequence[Exit], count: int) -> Table:
    """Halting rules against always taking every step, the first."""
    rows = [
        [r.name, f"{r.exact:.1%}", f"{r.steps_mean:.1f}", f"{r.seconds:.3f} s", f"{r.speedup:.2f}x"]
        for r in exits
    ]
    title = f"Early exit, {count} puzzles, medians of interleaved rounds"
    return title, ["a puzzle ends at", "exact", "steps each", "time", "speed"], rows


def fastest(exits: Sequence[Exit]) -> str:
    """The fastest rule that costs no accuracy, in a sentence."""
    best, fixed = fastest_at_equal_accuracy(exits), exits[0]
    if best is fixed:
        return f"No rule solves as many as {fixed.name}."
    return (
        f"Fastest that solves no fewer than {fixed.name}: {best.name}, {best.speedup:.2f} times as "
        f"fast."
    )


def check_path(path: str | Path) -> Path:
    """The path of a picture, before anything is measured for it.

    Raises:
        InvalidArgument: its suffix is no kind of picture that is drawn here, or no folder is there.
        RecurxError: matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InvalidArgument(f"curve: expected a file {' or '.join(SUFFIXES)}, got {path}.")
    if not path.parent.is_dir():
        raise InvalidArgument(f"curve: no folder {path.parent} for {path.name}.")
    pyplot("eval --curve", "leave --curve out")
    return path


def write(path: Path, title: str, fill: Callable[[Any], None]) -> None:
    """A picture of 8 inches by 3.2 that `fill` draws; the suffix of `path` says its kind."""

    def titled(figure: Any) -> None:
        fill(figure)
        figure.axes[0].set_title(title, loc="left", fontsize=9)

    plt = pyplot("eval --curve", "leave --curve out")
    drawing.write(plt, [path], (8, 3.2), titled)


def draw_budgets(points: Sequence[Point], figure: Any, trained_steps: int | None = None) -> None:
    """Exact accuracy of `points` against steps and time, one line a number of rollouts.

    Args:
        trained_steps: marked by a vertical line: beyond it is what training never saw.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    left, right = figure.subplots(1, 2, sharey=True)
    numbers = sorted({p.rollouts for p in points})
    for number, rollouts in enumerate(numbers):
        line = [p for p in points if p.rollouts == rollouts]
        how: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)], "marker": "osD^v"[number % 5],
            "markersize": 4, "linewidth": 1.5,
            "label": f"{rollouts} rollout{'s' if rollouts > 1 else ''}",
        }  # fmt: skip
        exact = [100 * p.exact for p in line]
        left.plot([p.max_steps for p in line], exact, **how)
        right.plot([1000 * p.seconds for p in line], exact, **how)
    if trained_steps and trained_steps < max(p.max_steps for p in points):
        left.axvline(trained_steps, color=INK, linewidth=1, linestyle="--")
        left.text(trained_steps, 2, " steps in training", color=INK)
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.set_xlabel("supervision steps at most, each rollout")
    right.set_xscale("log")
    seconds = [p.seconds for p in points]
    narrow = max(seconds) < 5 * min(seconds)
    right.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if narrow else (1, 2, 5)))
    right.xaxis.set_minor_locator(NullLocator())
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.set_xlabel("milliseconds a puzzle")
    left.set_ylabel("exact answers, %")
    left.set_ylim(0, 102)
    if len(numbers) > 1:
        right.legend(loc="best")


def draw_exits(rows: Sequence[Mapping[str, Any]], axes: Any) -> None:
    """Exact accuracy of halting rules against the time that they take, fixed steps first.

    Args:
        rows: "name", "exact", "seconds" and "speedup" of each rule (`budgets.Exit`).
    """
    fixed = rows[0]
    axes.axhline(100 * fixed["exact"], color=INK, linewidth=1, linestyle="--")
    for number, row in enumerate(rows):
        colour = INK if row is fixed else COLOURS[(number - 1) % len(COLOURS)]
        label = f"{row['name']}: {row['exact']:.1%}, {row['speedup']:.1f}x"
        axes.plot(
            row["seconds"] / fixed["seconds"], 100 * row["exact"], color=colour, linestyle="",
            markersize=7, marker="osD^vPX"[number % 7], label=label,
        )  # fmt: skip
    axes.set_xlim(0, 1.05)
    axes.margins(y=0.15)
    axes.set_xlabel(f"time, as a share of {fixed['name']}")
    axes.set_ylabel("exact answers, %")
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)
