"""Sorting: a sequence of values, or of records with a value as their key, and the same in order.

Tokens: 0 is padding, v * tags + t + 1 the value v with tag t. Bare values can be sorted by counting
them: one layer of attention averages all tokens, which is a histogram. With tags the histogram has
`tags` times as many bins; narrower nets have to find a key's place first, then fetch what it holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recurx.errors import bad_argument
from recurx.tasks.base import Examples, Flags, Task, Tokens, hashed_share


@dataclass(frozen=True)
class Sorting(Task):
    """`length` values out of 0..values-1, repetitions allowed; with more than one tag, records:
    `length` different values (the keys), each with a random one of 0..tags-1."""

    length: int = 16
    values: int = 16
    tags: int = 1
    name: str = "sort"

    held_out_rule = "no training example has the same values, in whatever order"

    def __post_init__(self) -> None:
        for arg, value in (("length", self.length), ("values", self.values)):
            if value < 2:
                raise bad_argument("tasks.sort", arg, "at least 2", value)
        if self.tags < 1:
            raise bad_argument("tasks.sort", "tags", "at least 1", self.tags)
        if self.tags > 1 and self.values < self.length:
            raise bad_argument(
                "tasks.sort", "values", f"at least length={self.length}: the keys of records "
                "differ", self.values,
            )  # fmt: skip

    @property
    def seq_len(self) -> int:
        return self.length

    @property
    def vocab_size(self) -> int:
        return self.values * self.tags + 1

    def generate(self, rng: np.random.Generator, count: int) -> Examples:
        if self.tags == 1:
            inputs = rng.integers(1, self.values + 1, size=(count, self.length), dtype=np.int64)
        else:
            every = np.tile(np.arange(self.values, dtype=np.int64), (count, 1))
            keys = rng.permuted(every, axis=1)[:, : self.length]
            inputs = keys * self.tags + rng.integers(self.tags, size=keys.shape) + 1
        return Examples(inputs, np.sort(inputs, axis=1))

    def augment(self, rng: np.random.Generator, examples: Examples) -> Examples:
        return Examples(rng.permuted(examples.inputs, axis=1), examples.answers)

    def held_out(self, examples: Examples) -> Flags:
        keys = 1 + (np.sort(examples.inputs, axis=1) - 1) // self.tags
        return hashed_share(keys)

    def check(self, inputs: Tokens, answers: Tokens) -> Flags:
        return (np.sort(inputs, axis=1) == answers).all(axis=1)

    def text(self, tokens: NDArray[np.int64]) -> str:
        def shown(token: int) -> str:
            value, tag = divmod(token - 1, self.tags)
            return str(value) if self.tags == 1 else f"{value}:{tag}"

        return " ".join("." if token == 0 else shown(int(token)) for token in tokens)
