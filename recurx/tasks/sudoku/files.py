"""Reads Sudokus: lines of digits, and the CSV columns of Sudoku-Extreme.

A line of digits is a whole board, row after row, `0` or `.` for a blank; `#` starts a comment,
spaces around a board and empty lines are skipped, and lines end as on any system. The CSV has a
header with `question` and, optionally, `answer`, `rating` and `source`. (81 characters for 9x9;
smaller boards have fewer.)
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recurx.errors import InvalidArgument
from recurx.tasks.sudoku.layout import Boards, Layout
from recurx.tasks.text_files import numbers, opened, rows


@dataclass(frozen=True)
class PuzzleFile:
    """N puzzles as digits [N, cells], and their answers where the file has them."""

    puzzles: Boards
    answers: Boards | None = None
    ratings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.puzzles)


def read(path: str | Path, layout: Layout, limit: int | None = None) -> PuzzleFile:
    """Read at most `limit` puzzles from a text or CSV file.

    Raises:
        InvalidArgument: no such file, no puzzle in it, or a bad line (named with its number).
    """
    with opened(path, "puzzles") as file:
        head = file.readline()
        file.seek(0)
        if _is_csv(head):
            return _read_csv(file, str(path), layout, limit)
        return parse_lines(file, layout, str(path), limit)


def first_puzzle(path: str | Path) -> str:
    """The first board of a file as it is written there, "" if there is none; see `read`."""
    with opened(path, "puzzles") as file:
        head = file.readline()
        file.seek(0)
        if _is_csv(head):
            return next((row["question"] or "" for row in csv.DictReader(file)), "").strip()
        return next(filter(None, map(_without_comment, file)), "")


def _is_csv(head: str) -> bool:
    return "question" in head.strip().split(",")


def _without_comment(line: str) -> str:
    return line.partition("#")[0].strip()


def parse_lines(
    lines: Iterable[str], layout: Layout, source: str = "puzzle", limit: int | None = None
) -> PuzzleFile:
    """Puzzles from lines of digits; errors name `source` and the line number."""
    boards: list[list[int]] = []
    for number, line in enumerate(lines, start=1):
        if limit is not None and len(boards) == limit:
            break
        if text := _without_comment(line):
            boards.append(_board(text, layout, f"{source}:{number}"))
    if not boards:
        raise InvalidArgument(f"puzzles: {source} has no puzzle (only comments and empty lines).")
    return PuzzleFile(np.array(boards, dtype=np.int64))


def parse_boards(texts: Iterable[str], layout: Layout) -> Boards:
    """Boards [N, cells] that somebody typed; errors number them.

    Raises:
        InvalidArgument: one is no board.
    """
    boards = [_board(text.strip(), layout, f"puzzle {i}") for i, text in enumerate(texts, start=1)]
    return np.array(boards, dtype=np.int64).reshape(-1, layout.cells)


def _read_csv(file: Iterable[str], source: str, layout: Layout, limit: int | None) -> PuzzleFile:
    puzzles, answers, ratings = [], [], []
    for line, question, answer, rating in rows(file, "puzzles", source, limit):
        where = f"{source}:{line}, column"
        puzzles.append(_board(question.strip(), layout, f"{where} question"))
        if answer is not None:
            answers.append(_board(answer.strip(), layout, f"{where} answer"))
        ratings.append(rating)
    return PuzzleFile(
        np.array(puzzles, dtype=np.int64),
        np.array(answers, dtype=np.int64) if answers else None,
        tuple(ratings),
    )


def _board(text: str, layout: Layout, where: str) -> list[int]:
    known = {".": 0} | {str(digit): digit for digit in range(layout.size + 1)}
    expected = f"1-{layout.size}, or 0 or . for a blank"
    return numbers(text, layout.size, known, expected, "puzzles", where)
