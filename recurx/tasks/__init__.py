"""Tasks for recursive reasoners, by name.

task = recurx.tasks.get("sudoku-4x4")            # or "maze:size=12", "sort:length=20,values=9"
batch = recurx.tasks.Sampler(task, seed=1).draw(64)
task.check(batch.inputs, batch.answers).all()    # by the rules, no labels needed
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from recurx.errors import InvalidArgument
from recurx.tasks.arc import Arc
from recurx.tasks.base import PAD, Examples, Task
from recurx.tasks.chain import Chain
from recurx.tasks.compose import Compose
from recurx.tasks.english import EnglishTask
from recurx.tasks.maze import Maze, MazeHard
from recurx.tasks.ordering import Ordering
from recurx.tasks.reach import Reach
from recurx.tasks.sampler import Sampler
from recurx.tasks.sorting import Sorting
from recurx.tasks.sudoku import Sudoku
from recurx.tasks.trades import Trades

_MAKERS: dict[str, Callable[..., Task]] = {
    "sudoku": Sudoku,
    "sudoku-6x6": functools.partial(Sudoku, size=6),
    "sudoku-4x4": functools.partial(Sudoku, size=4),
    "sort": Sorting,
    "maze": Maze,
    "maze-hard": MazeHard,
    "chain": Chain,
    "compose": Compose,
    "reach": Reach,
    "arc": Arc,
    "arc-2": functools.partial(Arc, version=2),
    "order": Ordering,
    "trades": Trades,
}
NAMES = tuple(_MAKERS)

__all__ = [
    "NAMES",
    "PAD",
    "Arc",
    "Chain",
    "Compose",
    "EnglishTask",
    "Examples",
    "Maze",
    "MazeHard",
    "Ordering",
    "Reach",
    "Sampler",
    "Sorting",
    "Sudoku",
    "Task",
    "Trades",
    "get",
]


def get(name: str) -> Task:
    """The task called `name`, with options as `name:option=number,option=number`.

    Raises:
        InvalidArgument: unknown task or option (the known ones are listed), or a bad value.
    """
    base, _, options = name.partition(":")
    if base not in _MAKERS:
        raise InvalidArgument(f"tasks: expected one of {', '.join(NAMES)}, got {base!r}.")
    maker = _MAKERS[base]
    chosen = {key: _number(base, key, value) for key, value in _pairs(base, options)}
    known = _options(maker)
    for key in chosen:
        if key not in known:
            raise InvalidArgument(
                f"tasks: {base} has the options {', '.join(known)}, got {key!r} in {name!r}."
            )
    return maker(**chosen, name=name)


def _options(maker: Callable[..., Task]) -> list[str]:
    fixed = set(maker.keywords) if isinstance(maker, functools.partial) else set()
    made = maker.func if isinstance(maker, functools.partial) else maker
    names = [field.name for field in dataclasses.fields(made)]  # type: ignore[arg-type]
    return [name for name in names if name not in fixed | {"name"}]


def _pairs(base: str, options: str) -> list[tuple[str, str]]:
    pairs = [item.partition("=") for item in options.split(",") if item]
    return [(key.strip(), value.strip()) for key, _, value in pairs]


def _number(base: str, key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise InvalidArgument(
            f"tasks: option {key!r} of {base}: expected {base}:{key}=NUMBER, got {value!r}."
        ) from None
