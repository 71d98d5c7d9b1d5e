"""What a run trains on and is tested on: all that a `Trainer` asks of its data.

`recurx.train.task_data` makes one of a task of `recurx.tasks`; any object with these names will do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from recurx.models import RecursiveModel
from recurx.tasks.base import Examples
from recurx.train.config import Sizes, TrainConfig


class Judge(Protocol):
    """Tells right answers from wrong; a `recurx.tasks.Task` is one."""

    def right(self, examples: Examples, answers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the answers [N, T] to the examples are right, [N]."""


class Data(Sizes, Protocol):
    """An endless stream of examples, and others that it never gives."""

    @property
    def task(self) -> Judge:
        """Who judges answers to the examples."""

    def draw(self, count: int) -> Mapping[str, Tensor]:
        """The next `count` examples, as CPU tensors: "inputs" and "labels" int64 [count, T], the
        labels -100 where nothing is asked, and "puzzle_identifiers" int32 [count]."""

    def held_out(self, count: int) -> Examples:
        """At most `count` distinct examples that `draw` never gives."""

    def prepare_(self, model: RecursiveModel) -> None:
        """Change the fresh weights of `model` to a start that suits the data, in place; called once
        on the CPU, under the run's seed."""

    def pinned(self, config: TrainConfig) -> TrainConfig:
        """The config with what a resumed run needs to find the same data again."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: plain numbers and strings, fit for JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where the stream that made `state` stopped."""
