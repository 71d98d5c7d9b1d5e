"""Questions of a file with their answers: those of the file, or those that a search finds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recurx.errors import InvalidArgument
from recurx.experiments.tasks.maze import Maze
from recurx.experiments.tasks.maze import files as maze_files
from recurx.experiments.tasks.sudoku import Sudoku, files, solver
from recurx.experiments.tasks.sudoku.generate import FEWEST_CLUES
from recurx.experiments.tasks.sudoku.layout import to_tokens
from recurx.tasks.base import Examples, Task

LONG_SEARCH = 5000  # puzzles whose answers take so long to find that the wait is announced


@dataclass(frozen=True)
class Questions:
    """Examples, [N] of which the answer is known (None: of all), where they are from, in words, and
    how many seconds finding answers took."""

    examples: Examples
    known: NDArray[np.bool_] | None = None
    source: str = ""
    seconds: float = 0.0


def read(path: str, task: Task, limit: int | None, say: Callable[[str], object]) -> Questions:
    """At most `limit` Sudokus or mazes from a file; `say` announces a long search.

    Raises:
        InvalidArgument: the task is neither, or the file is bad.
    """
    start, source = time.perf_counter(), f"from {path}"
    if isinstance(task, Maze):
        examples, told = maze_files.read(path, task, limit)
        return Questions(examples, told, source, time.perf_counter() - start)
    if not isinstance(task, Sudoku):
        raise InvalidArgument(f"--puzzles: files hold Sudokus or mazes, the task is {task.name}.")
    found = files.read(path, task.layout, limit)
    answers, known = found.answers, found.known
    clues = (found.puzzles > 0).sum(axis=1)
    several = (clues < FEWEST_CLUES[9]) & (task.size == 9)  # so few clues have no one solution
    searched = np.flatnonzero(~known & ~several)
    if len(searched) > LONG_SEARCH:
        say(f"searching the answers of {len(searched)} puzzles, for `cells`")
    if len(searched):
        solved = solver.solve(task.layout, found.puzzles[searched])
        answers[searched], known[searched] = solved.boards, solved.count == 1
    if not known.all():
        source += f", {int((~known).sum())} of them without a unique solution"
    examples = Examples(to_tokens(found.puzzles), to_tokens(answers))
    return Questions(examples, known, source, time.perf_counter() - start)
