"""Boards in text files, as people have them: CSV with a header or without, lines, grids.

A CSV may use commas, semicolons or tabs, quote its cells, and name its columns in any order and
case (`COLUMNS`); without a header, the first cell of the length of a board is the question, a
second one the answer. Else a line is a whole board, or one row of it, and then as many lines are a
board. A file may begin with a byte order mark, end its lines as on any system, and be gzipped.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from recurx.errors import InvalidArgument

COLUMNS = {  # what a column is -> names that it has in the data sets of this world
    "question": ("question", "questions", "puzzle", "puzzles", "quiz", "quizzes", "sudoku", "maze",
                 "board", "problem", "input"),
    "answer": ("answer", "answers", "solution", "solutions", "solved", "output"),
    "rating": ("rating", "difficulty", "level"),
}  # fmt: skip
LONGEST_LINE = 1 << 20  # characters; a line without end would take all memory
_NO_ANSWER = ("", "-", "nan", "none", "null", "na", "n/a")  # what writers of CSV put for nothing
_LINE_ENDS = str.maketrans("", "", "\r\n")
_DECORATION = str.maketrans("", "", " \t\r\n|[],")
_HEADING = re.compile(r"[A-Za-z]+ *\d+:?")  # "Grid 01"


@dataclass(frozen=True)
class Row:
    """A board of a file: question, answer ("" if there is none) and rating as they are written, and
    where the first two are: file, line and column."""

    question: str
    where: str
    answer: str = ""
    where_answer: str = ""
    rating: str = ""


@contextlib.contextmanager
def opened(path: str | Path, what: str) -> Iterator[TextIO]:
    """A text or CSV file of `what` ("puzzles"), unpacked if it is gzipped, read within the block.

    Raises:
        InvalidArgument: it cannot be read, or is no text.
    """
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        # utf-8-sig: some editors begin a file with a byte order mark.
        how = {"mode": "rt", "newline": "", "encoding": "utf-8-sig"}
        with (gzip.open if packed else open)(path, **how) as text:  # type: ignore[operator]
            yield text
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            f"{what}: {path} is not a text file ({error.reason}): expected UTF-8."
        ) from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        if isinstance(error, InvalidArgument):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InvalidArgument(f"{what}: cannot read {path}: {reason}.") from error


def read(
    path: str | Path,
    what: str,
    sides: Sequence[int],
    limit: int | None = None,
    spaces: bool = False,
) -> list[Row]:
    """At most `limit` boards of a file; their lengths and characters are the caller's to check.

    Args:
        what: "puzzles" or "mazes", for errors.
        sides: rows that a board may have.
        spaces: spaces are cells. Else they, bars and rules decorate a board, and `#` starts a
            comment.

    Raises:
        InvalidArgument: it cannot be read, has no board, or is not a CSV of boards (line named).
    """
    found: list[Row] = []
    with opened(path, what) as file:
        for row in _rows(file, what, str(path), sides, spaces):
            if limit is not None and len(found) >= limit:
                break
            found.append(row)
    if not found:
        raise InvalidArgument(f"{what}: {path} has no {what[:-1]} (no line that holds a board).")
    return found


def bare(text: str, spaces: bool = False) -> str:
    """A board without the spaces, bars, brackets and commas that people put between its cells;
    without line ends only, where spaces are cells."""
    return text.translate(_LINE_ENDS if spaces else _DECORATION)


def _rows(
    file: TextIO, what: str, source: str, sides: Sequence[int], spaces: bool
) -> Iterator[Row]:
    lines, before = _lines(file, what, source), 0
    content = (lambda line: line.strip("\r\n")) if spaces else _content
    for head in lines:
        if content(head):
            break
        before += 1
    else:
        return
    form = {"delimiter": max(",;\t", key=head.count), "skipinitialspace": not spaces}
    header = next(csv.reader([head], **form), [])  # type: ignore[arg-type]
    columns = _columns(header)
    rest = chain([head], lines) if columns else map(content, chain([head], lines))
    reader = csv.reader(rest, strict=True, **form)  # type: ignore[arg-type]
    records = _records(reader, what, source, before)
    if columns:
        next(records)
        yield from _named(records, columns, len(header), what, spaces)
    else:
        yield from _unnamed(records, sides, what, spaces)


def _lines(file: TextIO, what: str, source: str) -> Iterator[str]:
    while line := file.readline(LONGEST_LINE):
        if len(line) == LONGEST_LINE:
            raise InvalidArgument(f"{what}: {source} has a line of {LONGEST_LINE:,} characters.")
        yield line


def _content(line: str) -> str:
    """A line without comment and spaces around it; "" for a rule (---+---) of a drawn board."""
    text = line.partition("#")[0].strip()
    return text if text.strip("-+=| ") else ""


def _records(reader: Any, what: str, source: str, before: int) -> Iterator[tuple[str, list[str]]]:
    """(file and line, cells) of each row that is not empty."""
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InvalidArgument(
                f"{what}: {source}:{before + reader.line_num}: not a row of a CSV ({error}): "
                f'expected quotes around whole cells or none, look for a stray ".'
            ) from error
        if cells is None:
            return
        if any(cells):
            yield f"{source}:{before + reader.line_num}", cells


def _columns(header: Sequence[str]) -> dict[str, tuple[int, str]] | None:
    """{what a column is: (its number, its name here)}; None if no cell names a question."""
    at = {cell.strip().casefold(): i for i, cell in reversed([*enumerate(header)])}
    found = {
        kind: (at[name], header[at[name]].strip())
        for kind, names in COLUMNS.items()
        for name in reversed(names)
        if name in at
    }
    return found if "question" in found else None


def _named(
    records: Iterator[tuple[str, list[str]]],
    columns: Mapping[str, tuple[int, str]],
    width: int,
    what: str,
    spaces: bool,
) -> Iterator[Row]:
    for where, cells in records:
        if any(map(str.strip, cells[width:])):
            raise InvalidArgument(
                f"{what}: {where}: expected {width} cells, as in the header, got {len(cells)}. "
                f"Quote cells that have the delimiter in them."
            )
        cells += [""] * (width - len(cells))
        got = {kind: cells[number] for kind, (number, _) in columns.items()}
        at = {kind: f"{where}, column {name}" for kind, (_, name) in columns.items()}
        answer = got.get("answer", "")
        told = answer.strip().casefold() not in _NO_ANSWER
        yield Row(
            bare(got["question"], spaces), at["question"], bare(answer, spaces) if told else "",
            at.get("answer", ""), got.get("rating", "").strip(),
        )  # fmt: skip


def _unnamed(
    records: Iterator[tuple[str, list[str]]], sides: Sequence[int], what: str, spaces: bool
) -> Iterator[Row]:
    squares, first = [side * side for side in sides], True
    grid, start, width = "", "", 0  # of a board that goes on: its text, place and columns
    for where, cells in records:
        if _HEADING.fullmatch(cells[0].strip()) and not spaces:
            continue
        boards = [text for text in (bare(cell, spaces) for cell in cells) if len(text) in squares]
        if len(cells) in (*sides, *squares) and not spaces:  # a cell of the board each
            cells = [cell or "." for cell in cells]
        whole = bare("".join(cells), spaces)
        if first and not boards and re.search("[A-Za-z]{4}", whole):
            raise InvalidArgument(
                f"{what}: {where}: expected boards, or a header that has the column question (or "
                f"{', '.join(COLUMNS['question'][2:])}; and perhaps answer, rating), got "
                f"{','.join(cells)[:80]!r}. Rename the column."
            )
        first = False
        if not boards and len(whole) in sides and (not grid or len(whole) == width):
            width = len(whole)
            start = start if grid else where
            grid += whole
            if len(grid) < width * width:
                continue
            whole = ""
        if grid:  # complete, or ended too early, which its length tells
            yield Row(grid, start)
            grid = ""
        if boards:
            yield Row(boards[0], where, "".join(boards[1:2]), f"{where}, answer")
        elif whole:
            yield Row(whole, where)
    if grid:
        yield Row(grid, start)


def numbers(
    text: str, size: int, known: Mapping[str, int], expected: str, what: str, where: str
) -> list[int]:
    """What each character of a `size` x `size` board stands for, by `known`.

    Args:
        expected: `known` in words.
        what: "puzzles" or "mazes".
        where: file, line and column, for errors.

    Raises:
        InvalidArgument: another number of characters, or one that is not known.
    """
    if len(text) != size * size:
        side = math.isqrt(len(text))
        got = f"{side}x{side}" if side * side == len(text) else f"{len(text)} characters"
        raise InvalidArgument(
            f"{what}: {where}: expected {size * size} characters (a {size}x{size} board, row after "
            f"row), got {got}."
        )
    for column, character in enumerate(text, start=1):
        if character not in known:
            raise InvalidArgument(
                f"{what}: {where}, character {column}: expected {expected}, got {character!r}."
            )
    return [known[character] for character in text]
