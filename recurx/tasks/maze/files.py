"""Reads mazes: the CSV columns of the published Maze-Hard data.

The header names `question` and, optionally, `answer`, `rating` and `source`. A question is a whole
square maze, row after row, of `#` wall, space, S and G; an answer has `o` on the cells of the path
between S and G.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recurx.errors import InvalidArgument
from recurx.tasks.base import Examples, Flags
from recurx.tasks.maze import CHARACTERS, PATH, Maze
from recurx.tasks.text_files import opened

TOKENS = {character: token for token, character in enumerate(CHARACTERS) if token}


def read(path: str | Path, task: Maze, limit: int | None = None) -> tuple[Examples, Flags]:
    """At most `limit` mazes of the size of `task` [N, T], and which answers the file has [N]; the
    others are a shortest path, perhaps one of several.

    Raises:
        InvalidArgument: no such file, no maze in it, or a bad line (named with its number).
    """
    with opened(path, "mazes") as file:
        return _read(file, str(path), task, limit)


def _read(
    file: Iterable[str], source: str, task: Maze, limit: int | None
) -> tuple[Examples, Flags]:
    reader = csv.DictReader(file)
    if "question" not in (reader.fieldnames or []):
        raise InvalidArgument(
            f"mazes: {source}: expected a CSV whose header has the column question (and answer, "
            f"rating, source), got {','.join(reader.fieldnames or [])[:80]!r}."
        )
    questions, answers = [], []
    for row in islice(reader, limit):
        where = f"{source}, line {reader.line_num}"
        questions.append(_tokens(row["question"] or "", task, f"{where}, column question"))
        if PATH in questions[-1]:
            raise InvalidArgument(f"mazes: {where}, column question: o is for answers alone.")
        text = row.get("answer") or ""
        answers.append(_tokens(text, task, f"{where}, column answer") if text else None)
    if not questions:
        raise InvalidArgument(f"mazes: {source} has a header and no maze.")
    inputs = np.stack(questions)
    solved = task.solve(inputs)
    known = np.array([answer is not None for answer in answers])
    solved[known] = np.array([a for a in answers if a is not None], dtype=np.int64).reshape(
        -1, task.seq_len
    )
    return Examples(inputs, solved), known


def _tokens(text: str, task: Maze, where: str) -> NDArray[np.int64]:
    if len(text) != task.seq_len:
        side = math.isqrt(len(text))
        got = f"{side}x{side}" if side * side == len(text) else f"{len(text)} characters"
        raise InvalidArgument(
            f"mazes: {where}: expected {task.seq_len} characters (a {task.size}x{task.size} maze, "
            f"row after row), got {got}."
        )
    for column, character in enumerate(text, start=1):
        if character not in TOKENS:
            raise InvalidArgument(
                f"mazes: {where}, character {column}: expected one of {CHARACTERS[1:]!r}, "
                f"got {character!r}."
            )
    return np.array([TOKENS[character] for character in text], dtype=np.int64)
