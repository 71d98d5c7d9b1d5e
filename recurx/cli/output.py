"""What commands print: rich on a terminal, plain text elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from recurx.cli import options

# NOTE: rich guesses 80 columns where there is no terminal, and wraps what a script wants to parse.
WIDTH_WITHOUT_TERMINAL = 100


def make_console(quiet: bool = False, stderr: bool = False) -> Console:
    """A console that prints text as it is: a path with "[/b]" in it is no markup.

    Args:
        stderr: where to, so that stdout has the line of --json alone.
    """
    console = Console(highlight=False, markup=False, quiet=quiet, stderr=stderr)
    if not console.is_terminal:
        console.width = WIDTH_WITHOUT_TERMINAL
    return console


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The first column is left-aligned, numbers to the right."""
    first, *others = columns
    heads = [first, *(Column(name, justify="right") for name in others)]
    made = Table(*heads, title=title, title_justify="left", title_style="bold")
    for row in rows:
        made.add_row(*row)
    return made


def progress_bar(console: Console, label: str, text: str, transient: bool = False) -> Progress:
    """A bar between two texts and the time, on a terminal; nothing elsewhere.

    Args:
        text: of each moment, in rich's terms: "{task.completed} of {task.total}".
    """
    return Progress(
        TextColumn(label, markup=False), BarColumn(bar_width=30), TextColumn(text, markup=False),
        TimeElapsedColumn(), console=console, disable=not console.is_terminal, transient=transient,
    )  # fmt: skip


@contextmanager
def counting(console: Console, label: str, lines: str = "") -> Iterator[Callable[[int, int], None]]:
    """A bar from the first call on with (how many are done, of how many), on a terminal.

    Args:
        lines: what is counted, for a line each tenth where there is no terminal; "" for none.
    """
    bar = progress_bar(console, label, "{task.completed:.0f} of {task.total:.0f}", transient=True)
    row = bar.add_task("", total=0)
    tenth = 0

    def show(done: int, total: int) -> None:
        nonlocal tenth
        bar.start()
        bar.update(row, completed=done, total=total)
        if lines and not console.is_terminal and 10 * done // total > tenth:
            tenth = 10 * done // total
            console.print(f"  {label} {done:,} of {total:,} {lines}")

    try:
        yield show
    finally:
        bar.stop()


def json_line(values: dict[str, Any]) -> None:
    """The last line of a command run with --json: one JSON object, whatever the console is."""
    print(json.dumps(values), file=options.answers or sys.stdout, flush=True)
