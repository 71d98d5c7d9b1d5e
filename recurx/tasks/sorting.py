"""Sorting: a sequence of values, and the same values in order.

Tokens: 0 is padding, v + 1 the value v. No net of fixed depth that looks once can sort long
sequences, which makes this the smallest task on which recursion shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recurx.errors import bad_argument
from recurx.tasks.base import Examples, Flags, Task, Tokens, hashed_share

HELD_OUT_SHARE = 8


@dataclass(frozen=True)
class Sorting(Task):
    """`length` values out of 0..values-1, repetitions allowed."""

    length: int = 16
    values: int = 16
    name: str = "sort"

    def __post_init__(self) -> None:
        for arg, value in (("length", self.length), ("values", self.values)):
            if value < 2:
                raise bad_argument("tasks.sort", arg, "at least 2", value)

    @property
    def seq_len(self) -> int:
        return self.length

    @property
    def vocab_size(self) -> int:
        return self.values + 1

    @property
    def held_out_rule(self) -> str:
        return "no training example has the same values, in whatever order"

    def generate(self, rng: np.random.Generator, count: int) -> Examples:
        inputs = rng.integers(1, self.values + 1, size=(count, self.length), dtype=np.int64)
        return Examples(inputs, np.sort(inputs, axis=1))

    def augment(self, rng: np.random.Generator, examples: Examples) -> Examples:
        return Examples(rng.permuted(examples.inputs, axis=1), examples.answers)

    def held_out(self, examples: Examples) -> Flags:
        return hashed_share(np.sort(examples.inputs, axis=1), HELD_OUT_SHARE)

    def check(self, inputs: Tokens, answers: Tokens) -> Flags:
        return (np.sort(inputs, axis=1) == answers).all(axis=1)

    def text(self, tokens: NDArray[np.int64]) -> str:
        return " ".join("." if token == 0 else str(token - 1) for token in tokens)
