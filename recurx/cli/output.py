"""What commands print: rich on a terminal, plain text elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from recurx.solving.budgets import Exit

# NOTE: rich guesses 80 columns where there is no terminal, and wraps what a script wants to parse.
WIDTH_WITHOUT_TERMINAL = 100


def make_console(quiet: bool = False) -> Console:
    console = Console(highlight=False, quiet=quiet)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH_WITHOUT_TERMINAL, quiet=quiet)
    return console


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The first column is left-aligned, numbers to the right."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*row)
    return made


def bar(share: float, width: int = 40) -> str:
    """A horizontal bar in plain ASCII."""
    return "#" * round(share * width)


def curve(accuracies: Sequence[float]) -> str:
    """Exact accuracy against steps of refinement, one line a step."""
    return "\n".join(
        f"  {step:3d} {'step ' if step == 1 else 'steps'} {accuracy:7.1%}  {bar(accuracy)}"
        for step, accuracy in enumerate(accuracies, start=1)
    )


def exits(rows: Sequence[Exit], count: int) -> Table:
    """Halting rules against always taking every step."""
    made = [
        [r.name, f"{r.exact:.1%}", f"{r.steps_mean:.1f}", f"{r.seconds:.3f} s", f"{r.speedup:.2f}x"]
        for r in rows
    ]
    columns = ["a puzzle ends at", "exact", "steps each", "time", "speed"]
    return table(f"Early exit, {count} puzzles, medians of interleaved rounds", columns, made)


def fastest_exit(rows: Sequence[Exit]) -> str:
    """What the table comes to, in a sentence."""
    from recurx.solving.budgets import fastest_at_equal_accuracy

    best = fastest_at_equal_accuracy(rows)
    if best is rows[0]:
        return f"No rule solves as many as {rows[0].name}."
    return (
        f"Fastest that solves no fewer than {rows[0].name}: {best.name}, {best.speedup:.2f} times "
        f"as fast."
    )


def side_by_side(boards: Sequence[str], gap: str = "     ") -> str:
    """Blocks of lines next to each other."""
    columns = [board.splitlines() for board in boards]
    widths = [max(map(len, lines)) for lines in columns]
    height = max(map(len, columns))
    return "\n".join(
        gap.join(
            (lines[row] if row < len(lines) else "").ljust(width)
            for lines, width in zip(columns, widths, strict=True)
        ).rstrip()
        for row in range(height)
    )


@contextmanager
def counting(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, moved by calling with how many of `total` are done; else nothing."""
    bar = Progress(
        TextColumn(what), BarColumn(bar_width=30), TextColumn("{task.completed} of {task.total}"),
        TimeElapsedColumn(), console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip
    row = bar.add_task("", total=total)
    with bar:
        yield lambda done: bar.update(row, completed=done)


def json_line(values: dict[str, Any]) -> None:
    """The last line of a command run with --json: one JSON object, whatever the console is."""
    print(json.dumps(values), flush=True)
