"""Reads mazes from CSV and text files, in the forms of `tasks.text_files`; spaces are cells.

A question is a whole square maze of `#` wall, space, S and G; an answer has `o` on the cells of the
path between S and G.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recurx.errors import InvalidArgument
from recurx.experiments.tasks import text_files
from recurx.experiments.tasks.maze import CHARACTERS, PATH, Maze
from recurx.tasks.base import Examples, Flags

TOKENS = {character: token for token, character in enumerate(CHARACTERS) if token}


def read(path: str | Path, task: Maze, limit: int | None = None) -> tuple[Examples, Flags]:
    """At most `limit` mazes of the size of `task` [N, T], and which answers the file has [N]; the
    others are a shortest path, perhaps one of several.

    Raises:
        InvalidArgument: no such file, no maze in it, or a bad line (named with its number).
    """
    return of_rows(text_files.read(path, "mazes", (task.size,), limit, spaces=True), task)


def of_rows(rows: Sequence[text_files.Row], task: Maze) -> tuple[Examples, Flags]:
    """The mazes of some rows of a file; the same errors."""
    questions, answers = [], []
    for row in rows:
        questions.append(_tokens(row.question, task, row.where))
        if PATH in questions[-1]:
            raise InvalidArgument(f"mazes: {row.where}: o is for answers alone.")
        answers.append(_tokens(row.answer, task, row.where_answer) if row.answer else None)
    inputs = np.array(questions, dtype=np.int64)
    solved = task.solve(inputs)
    for row, tokens in enumerate(answers):
        if tokens is not None:
            solved[row] = tokens
    return Examples(inputs, solved), np.array([tokens is not None for tokens in answers])


def _tokens(text: str, task: Maze, where: str) -> list[int]:
    return text_files.numbers(text, task.size, TOKENS, f"one of {CHARACTERS[1:]!r}", "mazes", where)
