"""Reads Sudokus: lines of digits, and the CSV columns of Sudoku-Extreme.

A line of digits is a whole board, row after row, `0` or `.` for a blank; `#` starts a comment and
empty lines are skipped. The CSV has a header with `question` and, optionally, `answer`, `rating`
and `source`. (81 characters for 9x9; smaller boards have fewer.)
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recurx.errors import InvalidArgument
from recurx.tasks.sudoku.layout import Boards, Layout


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
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            head = file.readline()
            file.seek(0)
            if "question" in head.strip().split(","):
                return _read_csv(file, str(path), layout, limit)
            return parse_lines(file, layout, str(path), limit)
    except OSError as error:
        raise InvalidArgument(f"puzzles: cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"puzzles: {path} is not a text file ({error.reason}).") from error


def parse_lines(
    lines: Iterable[str], layout: Layout, source: str = "puzzle", limit: int | None = None
) -> PuzzleFile:
    """Puzzles from lines of digits; errors name `source` and the line number."""
    boards: list[list[int]] = []
    for number, line in enumerate(lines, start=1):
        if limit is not None and len(boards) == limit:
            break
        text = line.partition("#")[0].strip()
        if text:
            boards.append(_board(text, layout, f"{source}, line {number}"))
    if not boards:
        raise InvalidArgument(f"puzzles: {source} has no puzzle (only comments and empty lines).")
    return PuzzleFile(np.array(boards, dtype=np.int64))


def _read_csv(file: Iterable[str], source: str, layout: Layout, limit: int | None) -> PuzzleFile:
    reader = csv.DictReader(file)
    columns = reader.fieldnames or []
    puzzles, answers, ratings = [], [], []
    for row in _first(reader, limit):
        where = f"{source}, line {reader.line_num}"
        puzzles.append(_board(row["question"] or "", layout, f"{where}, column question"))
        if "answer" in columns:
            answers.append(_board(row["answer"] or "", layout, f"{where}, column answer"))
        ratings.append(row.get("rating") or "")
    if not puzzles:
        raise InvalidArgument(f"puzzles: {source} has a header and no puzzle.")
    return PuzzleFile(
        np.array(puzzles, dtype=np.int64),
        np.array(answers, dtype=np.int64) if answers else None,
        tuple(ratings),
    )


def _first(
    rows: Iterable[dict[str, str | None]], limit: int | None
) -> Iterator[dict[str, str | None]]:
    for index, row in enumerate(rows):
        if index == limit:
            return
        yield row


def _board(text: str, layout: Layout, where: str) -> list[int]:
    if len(text) != layout.cells:
        raise InvalidArgument(
            f"puzzles: {where}: expected {layout.cells} characters (a {layout.size}x{layout.size} "
            f"board, row after row), got {len(text)}."
        )
    board = []
    for column, character in enumerate(text, start=1):
        digit = 0 if character == "." else ord(character) - ord("0")
        if not 0 <= digit <= layout.size:
            raise InvalidArgument(
                f"puzzles: {where}, character {column}: expected 1-{layout.size}, or 0 or . for a "
                f"blank, got {character!r}."
            )
        board.append(digit)
    return board
