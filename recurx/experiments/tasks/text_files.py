"""Boards in text files, as people have them: CSV with a header or without, lines, grids; gzipped.

A CSV has commas, semicolons or tabs, and names its columns in any order and case (`COLUMNS`). With
no header, the first cell of the length of a board is the question, a second one the answer. JSON
lines are objects with such names. Else a line is a board, or a row of it, and then as many lines
are one.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
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
Records = Iterator[tuple[str, list[str]]]  # (file and line, cells)
_HEADING = re.compile(r"[A-Za-z]+ *\d+:?")  # "Grid 01"


@dataclass(frozen=True)
class Row:
    """Question, answer ("" if there is none) and rating as they are written, and where: file, line
    and column."""

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
        spaces: spaces are cells. Else they, bars and rules decorate, and `#` starts a comment.

    Raises:
        InvalidArgument: it cannot be read, has no board, or is not a CSV of boards (line named).
    """
    return list(islice(stream(path, what, sides, spaces), limit))


def stream(
    path: str | Path, what: str, sides: Sequence[int], spaces: bool = False
) -> Iterator[Row]:
    """The boards of a file one after the other, as `read` gives them: no more of it is in memory.
    The same errors."""
    none = True
    with opened(path, what) as file:
        for row in _rows(file, what, str(path), sides, spaces):
            none = False
            yield row
    if none:
        raise InvalidArgument(f"{what}: {path} has no {what[:-1]} (no line that holds a board).")


def bare(text: str, spaces: bool = False) -> str:
    """A board without what people put between its cells; line ends alone, where spaces are some."""
    return text.translate(_LINE_ENDS if spaces else _DECORATION)


def _rows(
    file: TextIO, what: str, source: str, sides: Sequence[int], spaces: bool
) -> Iterator[Row]:
    content = (lambda line: line.strip("\r\n")) if spaces else _content
    lines = iter(functools.partial(_line, file, what, source), "")
    before, head = 0, ""
    for head in lines:
        if content(head):
            break
        before += 1
    if head.startswith("{"):
        yield from _json_rows(chain([head], lines), what, source, before, spaces)
        return
    form: Any = {"delimiter": max(",;\t", key=head.count), "skipinitialspace": not spaces}
    header = next(csv.reader([head], **form), [])
    columns = {
        kind: (number, cell.strip())
        for kind, names in COLUMNS.items()
        for number, cell in reversed([*enumerate(header)])
        if cell.strip().casefold() in names
    }
    named = "question" in columns
    rest = chain([head], lines)
    reader = csv.reader(rest if named else map(content, rest), strict=True, **form)

    def records() -> Iterator[tuple[str, list[str]]]:
        for cells in reader:
            if any(cells):
                yield f"{source}:{before + reader.line_num}", cells

    try:
        if named:
            next(reader)
            yield from _named(records(), columns, len(header), what, spaces)
        else:
            yield from _unnamed(records(), sides, what, spaces)
    except csv.Error as error:
        raise InvalidArgument(
            f"{what}: {source}:{before + reader.line_num}: not a row of a CSV ({error}): expected "
            f'quotes around whole cells or none, look for a stray ".'
        ) from error


def _json_rows(
    lines: Iterator[str], what: str, source: str, before: int, spaces: bool
) -> Iterator[Row]:
    """Of JSON lines, one object each, whose keys are names of `COLUMNS`."""
    for number, line in enumerate(lines, start=before + 1):
        if not line.strip():
            continue
        where = f"{source}:{number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidArgument(f"{what}: {where}: not a line of JSON ({error}).") from error
        cells = {str(key).strip().casefold(): value for key, value in values.items()} if isinstance(
            values, dict) else {}  # fmt: skip
        got = {
            kind: next((str(cells[name]) for name in names if cells.get(name) is not None), "")
            for kind, names in COLUMNS.items()
        }
        if not got["question"]:
            raise InvalidArgument(
                f"{what}: {where}: expected an object with the key question (or "
                f"{', '.join(COLUMNS['question'][2:])}), got {line.strip()[:80]!r}."
            )
        answer = got["answer"]
        answer = "" if answer.strip().casefold() in _NO_ANSWER else bare(answer, spaces)
        yield Row(bare(got["question"], spaces), where, answer, f"{where}, answer", got["rating"])


def _line(file: TextIO, what: str, source: str) -> str:
    line = file.readline(LONGEST_LINE)
    if len(line) == LONGEST_LINE:
        raise InvalidArgument(f"{what}: {source} has a line of {LONGEST_LINE:,} characters.")
    return line


def _content(line: str) -> str:
    """A line without comment and spaces around it; "" for a rule (---+---) of a drawn board."""
    text = line.partition("#")[0].strip()
    return text if text.strip("-+=| ") else ""


def _named(
    records: Records, columns: dict[str, tuple[int, str]], width: int, what: str, spaces: bool
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
        answer = "" if answer.strip().casefold() in _NO_ANSWER else bare(answer, spaces)
        question, rating = bare(got["question"], spaces), got.get("rating", "").strip()
        yield Row(question, at["question"], answer, at.get("answer", ""), rating)


def _unnamed(records: Records, sides: Sequence[int], what: str, spaces: bool) -> Iterator[Row]:
    squares = [side * side for side in sides]
    grid, start, width = "", "", 0  # of a board that goes on: its text, place and columns
    for number, (where, cells) in enumerate(records):
        if _HEADING.fullmatch(cells[0].strip()) and not spaces:
            continue
        boards = [text for text in (bare(cell, spaces) for cell in cells) if len(text) in squares]
        if len(cells) in (*sides, *squares) and not spaces:  # a cell of the board each
            cells = [cell or "." for cell in cells]
        whole = bare("".join(cells), spaces)
        if not number and not boards and re.search("[A-Za-z]{4}", whole):
            raise InvalidArgument(
                f"{what}: {where}: expected boards, or a header that has the column question (or "
                f"{', '.join(COLUMNS['question'][2:])}; and perhaps answer, rating), got "
                f"{','.join(cells)[:80]!r}. Rename the column."
            )
        if not boards and len(whole) in sides and len(whole) == (width if grid else len(whole)):
            start, width = (start, width) if grid else (where, len(whole))
            grid, whole = grid + whole, ""
            if len(grid) < width * width:
                continue
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
    """What each character of a `size` x `size` board stands for, by `known` (`expected` in words).

    Raises:
        InvalidArgument: another number of characters, or one that is not known; it says `where`.
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
