"""Reads Sudokus from text and CSV files (`recurx.experiments.tasks.text_files` tells which).

A board is 81 characters for 9x9, fewer for smaller ones: digits, and `0`, `.`, `_` or `*` for a
blank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recurx.experiments.tasks import text_files
from recurx.experiments.tasks.sudoku.layout import BOX_SHAPES, Boards, Layout
from recurx.tasks.base import Flags

BLANKS = dict.fromkeys("0._*", 0)


@dataclass(frozen=True)
class PuzzleFile:
    """N puzzles as digits [N, cells], their answers (zeros where the file has none), ratings."""

    puzzles: Boards
    answers: Boards
    ratings: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.puzzles)

    @property
    def known(self) -> Flags:
        """[N] whether the file has the answer."""
        return (self.answers > 0).any(axis=1)


def read(path: str | Path, layout: Layout, limit: int | None = None) -> PuzzleFile:
    """Read at most `limit` puzzles from a text or CSV file.

    Raises:
        InvalidArgument: no such file, no puzzle in it, or a bad line (named with its number).
    """
    return of_rows(text_files.read(path, "puzzles", (layout.size,), limit), layout)


def of_rows(rows: Sequence[text_files.Row], layout: Layout) -> PuzzleFile:
    """The puzzles of some rows of a file; the same errors."""
    answers = np.zeros((len(rows), layout.cells), dtype=np.int64)
    for number, row in enumerate(rows):
        if set(row.answer) - set(BLANKS):
            answers[number] = _board(row.answer, layout, row.where_answer, blanks={})
    puzzles = np.array([_board(row.question, layout, row.where) for row in rows], dtype=np.int64)
    return PuzzleFile(puzzles, answers, tuple(row.rating for row in rows))


def first_puzzle(path: str | Path) -> str:
    """The first board of a file, as characters; see `read`."""
    return text_files.read(path, "puzzles", tuple(BOX_SHAPES), 1)[0].question


def parse_boards(texts: Iterable[str], layout: Layout) -> Boards:
    """Boards [N, cells] that somebody typed; errors number them.

    Raises:
        InvalidArgument: one is no board.
    """
    boards = [
        _board(text_files.bare(text), layout, f"puzzle {i}") for i, text in enumerate(texts, 1)
    ]
    return np.array(boards, dtype=np.int64).reshape(-1, layout.cells)


def _board(text: str, layout: Layout, where: str, blanks: dict[str, int] = BLANKS) -> list[int]:
    known = blanks | {str(digit): digit for digit in range(1, layout.size + 1)}
    expected = f"1-{layout.size}" + ", or 0 . _ * for a blank" * bool(blanks)
    return text_files.numbers(text, layout.size, known, expected, "puzzles", where)
