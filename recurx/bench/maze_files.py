"""Reads mazes: the CSV columns of the published Maze-Hard data.

The header names `question` and, optionally, `answer`, `rating` and `source`. A question is a whole
square maze, row after row, of `#` wall, space, S and G; an answer has `o` on the cells of the path
between S and G.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recurx.errors import InvalidArgument
from recurx.tasks.base import Examples, Flags
from recurx.tasks.maze import CHARACTERS, PATH, Maze
from recurx.tasks.text_files import numbers, opened, rows

TOKENS = {character: token for token, character in enumerate(CHARACTERS) if token}


def read(path: str | Path, task: Maze, limit: int | None = None) -> tuple[Examples, Flags]:
    """At most `limit` mazes of the size of `task` [N, T], and which answers the file has [N]; the
    others are a shortest path, perhaps one of several.

    Raises:
        InvalidArgument: no such file, no maze in it, or a bad line (named with its number).
    """
    with opened(path, "mazes") as file:
        found = rows(file, "mazes", str(path), limit)
    questions, answers = [], []
    for line, question, answer, _ in found:
        where = f"{path}, line {line}, column"
        questions.append(_tokens(question, task, f"{where} question"))
        if PATH in questions[-1]:
            raise InvalidArgument(f"mazes: {where} question: o is for answers alone.")
        answers.append(_tokens(answer, task, f"{where} answer") if answer else None)
    inputs = np.array(questions, dtype=np.int64)
    solved = task.solve(inputs)
    for row, tokens in enumerate(answers):
        if tokens is not None:
            solved[row] = tokens
    return Examples(inputs, solved), np.array([tokens is not None for tokens in answers])


def _tokens(text: str, task: Maze, where: str) -> list[int]:
    return numbers(text, task.size, TOKENS, f"one of {CHARACTERS[1:]!r}", "mazes", where)
