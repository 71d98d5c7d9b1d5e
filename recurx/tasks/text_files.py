"""What files of puzzles share: opening, columns, characters, with errors that say what is wrong."""

from __future__ import annotations

import contextlib
import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TextIO

from recurx.errors import InvalidArgument


@contextlib.contextmanager
def opened(path: str | Path, what: str) -> Iterator[TextIO]:
    """A text or CSV file of `what` ("puzzles"), read within the block.

    Raises:
        InvalidArgument: it cannot be read, or is no text, or no CSV to one who reads it as such.
    """
    try:
        # utf-8-sig: some editors begin a file with a byte order mark.
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            yield file
    except OSError as error:
        raise InvalidArgument(f"{what}: cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{what}: {path} is not a text file ({error.reason}).") from error
    except csv.Error as error:
        raise InvalidArgument(f"{what}: {path} is not a CSV file ({error}).") from error


def rows(
    file: Iterable[str], what: str, source: str, limit: int | None
) -> list[tuple[int, str, str | None, str]]:
    """(line, question, answer, rating) of at most `limit` rows of a CSV, "" where a cell is empty;
    the answer is None in a file without that column.

    Raises:
        InvalidArgument: the header has no column `question`, or no row follows.
    """
    reader = csv.DictReader(file, restval="")
    names = reader.fieldnames or []
    if "question" not in names:
        raise InvalidArgument(
            f"{what}: {source}: expected a CSV whose header has the column question (and answer, "
            f"rating, source), got {','.join(names)[:80]!r}."
        )
    found = [
        (reader.line_num, row["question"], row.get("answer"), row.get("rating", ""))
        for row in islice(reader, limit)
    ]
    if not found:
        raise InvalidArgument(f"{what}: {source} has a header and no {what[:-1]}.")
    return found


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
