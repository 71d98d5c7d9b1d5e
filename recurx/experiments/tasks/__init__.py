"""The tasks of recurx: puzzles, and tasks that test claims about recursion. Each needs many
dependent operations, and few rules.

`recurx.tasks.get` finds them by the entry points in pyproject.toml, of an installed recurx and of a
checkout alike. Where neither is at hand (a copy of the package alone), importing this package makes
them known, as the command line does.
"""

from __future__ import annotations

import functools

from recurx import tasks
from recurx.experiments.tasks.arc import Arc
from recurx.experiments.tasks.chain import Chain
from recurx.experiments.tasks.compose import Compose
from recurx.experiments.tasks.maze import Maze, MazeHard
from recurx.experiments.tasks.ordering import Ordering
from recurx.experiments.tasks.reach import Reach
from recurx.experiments.tasks.sorting import Sorting
from recurx.experiments.tasks.sudoku import Sudoku
from recurx.experiments.tasks.trades import Trades

Sudoku6x6, Sudoku4x4 = (functools.partial(Sudoku, size=size) for size in (6, 4))
Arc2 = functools.partial(Arc, version=2)

# The same names and makers stand in pyproject.toml, as entry points.
TASKS = {
    "sudoku": Sudoku,
    "sudoku-6x6": Sudoku6x6,
    "sudoku-4x4": Sudoku4x4,
    "maze": Maze,
    "maze-hard": MazeHard,
    "arc": Arc,
    "arc-2": Arc2,
    "sort": Sorting,
    "chain": Chain,
    "compose": Compose,
    "reach": Reach,
    "order": Ordering,
    "trades": Trades,
}
for _name, _maker in TASKS.items():
    tasks.register(_name, _maker)
