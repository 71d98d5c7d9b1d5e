"""`solve --html FILE`: one page on which boards are thought through, step by step.

Every step of a board is a table in the page, so it reads without a script too; a few lines of
script show the one that the slider says. The page asks no network for anything, and forbids itself
to.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recurx.atomic import replacing
from recurx.experiments.tasks.sudoku.layout import to_boards

if TYPE_CHECKING:
    from recurx.experiments.tasks.sudoku import Sudoku
    from recurx.solving.solve import Answers

STYLE = """
:root { color-scheme: light dark; --bg: #fcfcfb; --ink: #1c1c1a; --dim: #62625d; --line: #c9c9c2;
  --given: #ecece6; --changed: #f6d9a8; --wrong: #c0341d; }
@media (prefers-color-scheme: dark) { :root { --bg: #171716; --ink: #ecece8; --dim: #a3a39c;
  --line: #4a4a46; --given: #2a2a28; --changed: #6a4d16; --wrong: #ff8a73; } }
body { margin: 0 auto; max-width: 40rem; padding: 1rem; background: var(--bg); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .3rem; }
p, figcaption { color: var(--dim); margin: .2rem 0; } figure { margin: .6rem 0; }
table { border-collapse: collapse; border: 2px solid var(--ink); }
td { width: 2.1rem; height: 2.1rem; text-align: center; border: 1px solid var(--line);
  font-size: 1.15rem; padding: 0; }
td.right { border-right: 2px solid var(--ink); }
tr.below td { border-bottom: 2px solid var(--ink); }
td.given { background: var(--given); font-weight: 600; } td.changed { background: var(--changed); }
td.wrong { color: var(--wrong); text-decoration: underline; }
input[type=range] { width: min(100%, 24rem); } .shown figure { display: none; }
.shown figure.now { display: block; }
"""
SCRIPT = """
for (const board of document.querySelectorAll("section")) {
  const steps = board.querySelectorAll("figure"), slider = board.querySelector("input");
  const show = () => steps.forEach((step, i) => step.classList.toggle("now", i == slider.value));
  board.classList.add("shown"); slider.hidden = false; slider.oninput = show; show();
}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@contextlib.contextmanager
def watching(model: Any) -> Iterator[list[list[float]]]:
    """Inside, the q of every row of every call of `model` is written down."""
    seen: list[list[float]] = []

    def after(module: Any, args: Any, output: Any) -> None:
        seen.append(output[1]["q_halt_logits"].float().tolist())

    hook = model.register_forward_hook(after)
    try:
        yield seen
    finally:
        hook.remove()


def q_of_steps(
    seen: Sequence[Sequence[float]], rollout_steps: Sequence[int], at_once: Sequence[int], q: float
) -> list[float]:
    """q after each step of the picked try of a puzzle that was solved by itself.

    Args:
        seen: of every call, the q of the tries that had not ended, in their order.
        rollout_steps: of every try.
        at_once: how many tries were made together, one batch after the other.
        q: of the picked try at its end.
    """
    call = first = 0
    found: list[float] = []
    for size in at_once:
        steps = rollout_steps[first : first + size]
        first += size
        tries: list[list[float]] = [[] for _ in steps]
        for step in range(max(steps, default=0)):
            going = [i for i, taken in enumerate(steps) if taken > step]
            for i, value in zip(going, seen[call], strict=True):
                tries[i].append(value)
            call += 1
        same = [values for values in tries if values and math.isclose(values[-1], q, abs_tol=1e-6)]
        found = same[0] if same else found
    return found


def write(
    path: str, task: Sudoku, inputs: NDArray[np.int64], answers: Sequence[Answers],
    q_steps: Sequence[Sequence[float]], verdicts: Sequence[str],
) -> None:  # fmt: skip
    """The page of N puzzles, each of which was solved by itself with a trace.

    Args:
        inputs: tokens [N, T].
        q_steps: of each puzzle, q after each step of the picked try.

    Raises:
        SaveFailed: the system refuses.
    """
    boards = "".join(
        _section(task, number, puzzle, found, q, verdict)
        for number, (puzzle, found, q, verdict) in enumerate(
            zip(inputs, answers, q_steps, verdicts, strict=True), start=1
        )
    )
    with replacing(Path(path)) as new:
        new.write_text(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            f'<link rel="icon" href="data:,"><title>{escape(task.name)}, step by step</title>'
            f"<style>{STYLE}</style></head><body><h1>{escape(task.name)}, step by step</h1>"
            "<p>Grey cells are given. Coloured cells changed in this step; red ones stand twice in "
            "a row, column or box. q is how sure the net is of the whole answer.</p>"
            f"{boards}<script>{SCRIPT}</script></body></html>\n",
            encoding="utf-8",
        )  # fmt: skip


def _section(
    task: Sudoku, number: int, puzzle: NDArray[np.int64], found: Answers, q: Sequence[float],
    verdict: str,
) -> str:  # fmt: skip
    assert found.trace is not None
    taken = int(found.steps[0])
    steps = to_boards(found.trace[:taken, 0].cpu().numpy())
    tries = int((found.rollout_steps > 0).sum())
    before, figures = (
        to_boards(puzzle),
        [_figure(task, puzzle, to_boards(puzzle), None, "question")],
    )
    for step, board in enumerate(steps, start=1):
        sure = f", sure by {1 / (1 + math.exp(-q[step - 1])):.1%}" if step <= len(q) else ""
        told = f", q {q[step - 1]:.2f}{sure}" if step <= len(q) else ""
        figures.append(_figure(task, puzzle, board, before, f"step {step} of {taken}{told}"))
        before = board
    many = f" The last of {tries} tries, " if tries > 1 else " One try, "
    total = int(found.rollout_steps.sum())
    return (
        f"<section><h2>Puzzle {number}: {escape(verdict)}</h2><p>{many}{total} steps in all.</p>"
        f'<input type="range" min="0" max="{len(figures) - 1}" value="{len(figures) - 1}" '
        f'aria-label="step" hidden>{"".join(figures)}</section>'
    )


def _figure(
    task: Sudoku, puzzle: NDArray[np.int64], board: NDArray[np.int64],
    before: NDArray[np.int64] | None, caption: str,
) -> str:  # fmt: skip
    layout = task.layout
    given, wrong = to_boards(puzzle) > 0, layout.twice(board)
    rows = []
    for row in range(layout.size):
        cells = []
        for column in range(layout.size):
            at = row * layout.size + column
            last = (column + 1) % layout.box_cols == 0 and column + 1 < layout.size
            known = {
                "given": given[at], "changed": before is not None and before[at] != board[at],
                "wrong": wrong[at], "right": last,
            }  # fmt: skip
            names = " ".join(name for name, holds in known.items() if holds)
            cells.append(f'<td class="{names}">{board[at] or ""}</td>')
        below = (row + 1) % layout.box_rows == 0 and row + 1 < layout.size
        rows.append(f'<tr class="{"below" * below}">{"".join(cells)}</tr>')
    table = f"<table><tbody>{''.join(rows)}</tbody></table>"
    return f"<figure>{table}<figcaption>{escape(caption)}</figcaption></figure>"
