"""Tasks in plain English: every token is a passage, a sentence or a name."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from recurx.tasks.base import PAD, Examples, Task

# Each is one word piece of the usual English vocabularies.
NAMES = (
    "Anna", "Ben", "Carl", "David", "Emma", "Frank", "Grace", "Henry", "Jack", "Kate", "Laura",
    "Max", "Nora", "Oscar", "Peter", "Rose", "Sarah", "Tom", "Lucy", "Paul", "Mia", "Sam", "Eva",
    "Leo",
)  # fmt: skip


class EnglishTask(Task):
    """A task whose token t is the passage `passages[t - 1]`; 0 is padding, as everywhere.

    Attributes:
        passages: the English of the tokens 1, 2, ...
        choices: how many of them can be an answer: the tokens 1..choices.
        answer_per_passage: whether answer k belongs to passage k.
    """

    answer_per_passage = False

    @property
    @abstractmethod
    def passages(self) -> tuple[str, ...]: ...

    @property
    @abstractmethod
    def choices(self) -> int: ...

    @property
    def vocab_size(self) -> int:
        return len(self.passages) + 1

    def hardest(self) -> EnglishTask:
        """The task without its curriculum: what is tested."""
        return self

    @staticmethod
    def lengths(examples: Examples) -> NDArray[np.int64]:
        """[N] answers that each example asks for."""
        lengths: NDArray[np.int64] = (examples.answers != PAD).sum(axis=1)
        return lengths

    def text(self, tokens: NDArray[np.int64]) -> str:
        words = [self.passages[token - 1] for token in tokens if token]
        return (" " if words and words[-1].endswith(".") else ", ").join(words)
