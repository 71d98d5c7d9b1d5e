"""Questions of a file with their answers: those of the file, or those that a search finds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recurx.errors import InvalidArgument
from recurx.experiments.tasks import text_files
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
    what, sides, spaces = _form(task)
    return of_rows(text_files.read(path, what, sides, limit, spaces), path, task, say)


def stream(path: str, task: Task, size: int, limit: int | None) -> Iterator[Questions]:
    """At most `limit` boards of a file in parts of `size`, the last may be smaller; the errors of
    `read`."""
    rows = itertools.islice(text_files.stream(path, *_form(task)), limit)
    while part := list(itertools.islice(rows, size)):
        yield of_rows(part, path, task, lambda text: None)


def _form(task: Task) -> tuple[str, tuple[int, ...], bool]:
    """What `text_files` asks: the name of boards, their sides, and whether spaces are cells."""
    if isinstance(task, Maze):
        return "mazes", (task.size,), True
    if not isinstance(task, Sudoku):
        raise InvalidArgument(f"--puzzles: files hold Sudokus or mazes, the task is {task.name}.")
    return "puzzles", (task.size,), False


def of_rows(
    rows: Sequence[text_files.Row], path: str, task: Task, say: Callable[[str], object]
) -> Questions:
    """The questions of some rows of the file `path`, with answers."""
    start, source = time.perf_counter(), f"from {path}"
    if isinstance(task, Maze):
        examples, told = maze_files.of_rows(rows, task)
        return Questions(examples, told, source, time.perf_counter() - start)
    assert isinstance(task, Sudoku), "checked by _form"
    found = files.of_rows(rows, task.layout)
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
