"""Tasks for recursive reasoners, by name.

task = recurx.tasks.get("sudoku-4x4")            # or "maze:size=12", "sort:length=20,values=9"
batch = recurx.tasks.Sampler(task, seed=1).draw(64)
task.check(batch.inputs, batch.answers).all()    # by the rules, no labels needed

A task is an entry point of the group "recurx.tasks", of recurx or of another package, whose name is
that of the task, and whose object makes it; or it is registered, where nothing is installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from recurx.errors import InvalidArgument, RecurxError
from recurx.tasks.base import PAD, Examples, Task
from recurx.tasks.sampler import Sampler

GROUP = "recurx.tasks"  # of entry points
MOST_TOKENS, MOST_DIGITS = 2**16, 9  # as of models
_MAKERS: dict[str, Callable[..., Task]] = {}  # those registered, and those of packages so far

__all__ = ["NAMES", "PAD", "Examples", "Sampler", "Task", "get", "names", "register"]


def get(name: str) -> Task:
    """The task called `name`, with options as `name:option=number,option=number`.

    Raises:
        InvalidArgument: unknown task or option (the known ones are listed), or a bad value.
        RecurxError: the package that has the task cannot be imported.
    """
    base, _, options = name.partition(":")
    maker = _maker(base)
    fixed = {"name", *getattr(maker, "keywords", ())}
    known = [option for option in inspect.signature(maker).parameters if option not in fixed]
    chosen = {}
    for option in filter(None, options.split(",")):
        key, value = (part.strip() for part in option.partition("=")[::2])
        if key not in known:
            raise InvalidArgument(
                f"tasks: {base} has the options {', '.join(known)}, got {key!r} in {name!r}."
            )
        if not value.removeprefix("-").isdecimal() or len(value) > MOST_DIGITS:
            raise InvalidArgument(
                f"tasks: option {key!r} of {base}: expected {base}:{key}=NUMBER of at most "
                f"{MOST_DIGITS} digits, got {value[:80]!r}."
            )
        chosen[key] = int(value)
    task = maker(**chosen, name=name)
    if task.seq_len > MOST_TOKENS:
        raise InvalidArgument(
            f"tasks: {name} has {task.seq_len:,} tokens: expected at most {MOST_TOKENS:,}."
        )
    return task


def register(name: str, maker: Callable[..., Task]) -> None:
    """Make a task known to `get`, in this process.

    Args:
        name: without options.
        maker: called with `name`, options included, and an int for each option that was given; its
            parameters are the options. A class of tasks, say.

    Raises:
        InvalidArgument: the name is taken by another maker, or has a colon.
    """
    if ":" in name:
        raise InvalidArgument(f"tasks.register: expected a name without options, got {name!r}.")
    if _MAKERS.setdefault(name, maker) is not maker:
        raise InvalidArgument(f"tasks.register: another task is called {name!r}: choose a name.")


def names() -> tuple[str, ...]:
    """All tasks: those registered, and those of installed packages, recurx among them."""
    installed = [point.name for point in entry_points(group=GROUP)]
    return tuple(dict.fromkeys([*_MAKERS, *installed]))


def __getattr__(name: str) -> Any:
    if name == "NAMES":
        return names()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _maker(base: str) -> Callable[..., Task]:
    if base in _MAKERS:
        return _MAKERS[base]
    for point in entry_points(group=GROUP, name=base):
        try:
            maker = point.load()
        except (ImportError, AttributeError) as error:
            raise RecurxError(f"tasks: {base} is {point.value}, which fails: {error}.") from error
        register(base, maker)
        return maker
    raise InvalidArgument(f"tasks: expected one of {', '.join(names())}, got {base!r}.")
