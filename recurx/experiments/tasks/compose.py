"""The word problem of a permutation group: compose permutations from left to right.

Token i is a permutation of `degree` things, the answer at i the product of the first i + 1 of them.
For degree 5 and more this is complete for NC1 (Barrington 1989): no net of fixed depth and width
does it for every length, if TC0 is not NC1. Degree 2 is the running parity. Tokens: 0 is padding,
k + 1 the k-th permutation in lexicographic order.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recurx.errors import bad_argument
from recurx.tasks.base import Examples, Flags, Task, Tokens, hashed_share


@dataclass(frozen=True)
class Compose(Task):
    """Words of `length` letters, each any of the degree! permutations."""

    length: int = 16
    degree: int = 5
    name: str = "compose"

    held_out_rule = "no training word becomes one of theirs when the permuted things are renamed"

    def __post_init__(self) -> None:
        if self.length < 2:
            raise bad_argument("tasks.compose", "length", "at least 2", self.length)
        if not 2 <= self.degree <= 5:
            raise bad_argument("tasks.compose", "degree", "2..5", self.degree)

    @property
    def seq_len(self) -> int:
        return self.length

    @property
    def vocab_size(self) -> int:
        return len(self._permutations) + 1

    def generate(self, rng: np.random.Generator, count: int) -> Examples:
        word = rng.integers(len(self._permutations), size=(count, self.length), dtype=np.int64)
        products = word.copy()
        for i in range(1, self.length):
            products[:, i] = self._product[products[:, i - 1], word[:, i]]
        return Examples(word + 1, products + 1)

    @functools.cached_property
    def _permutations(self) -> NDArray[np.int64]:
        return np.array(list(itertools.permutations(range(self.degree))), dtype=np.int64)

    @functools.cached_property
    def _product(self) -> NDArray[np.int64]:
        """[G, G]: the number of "a, then b"."""
        both = self._permutations[:, self._permutations].transpose(1, 0, 2)
        # both[a, b, i] is b[a[i]]; lexicographic order is the order of these base-5 numbers
        weights = 5 ** np.arange(self.degree)[::-1]
        return np.searchsorted(self._permutations @ weights, both @ weights)

    @functools.cached_property
    def _renamed(self) -> NDArray[np.int64]:
        """[G, G]: permutation x after the things were renamed by g, which is g^-1 x g."""
        group = np.arange(len(self._permutations))
        inverse = np.argmin(self._product, axis=1)  # the identity is number 0
        return self._product[self._product[inverse[:, None], group[None, :]], group[:, None]]

    def augment(self, rng: np.random.Generator, examples: Examples) -> Examples:
        renamed = self._renamed[rng.integers(len(self._permutations), size=(len(examples), 1))]
        rows = np.arange(len(examples))[:, None]
        by_row = renamed[:, 0]
        return Examples(
            by_row[rows, examples.inputs - 1] + 1, by_row[rows, examples.answers - 1] + 1
        )

    def held_out(self, examples: Examples) -> Flags:
        # The least hash over all images of a word is the same for each of its images.
        weights = np.random.SeedSequence(0).generate_state(self.length, np.uint64)
        images = self._renamed[:, examples.inputs - 1].astype(np.uint64)  # [G, N, T]
        hashes = ((images + np.uint64(1)) * weights).sum(axis=-1, dtype=np.uint64)
        return hashed_share(hashes.min(axis=0)[:, None].view(np.int64))

    def check(self, inputs: Tokens, answers: Tokens) -> Flags:
        """The first product is the first letter, each next one the one before, then the letter."""
        size = len(self._permutations)
        inside = ((answers >= 1) & (answers <= size) & (inputs >= 1) & (inputs <= size)).all(axis=1)
        word, products = (np.clip(t - 1, 0, size - 1) for t in (inputs, answers))
        follows = products[:, 1:] == self._product[products[:, :-1], word[:, 1:]]
        return inside & (products[:, 0] == word[:, 0]) & follows.all(axis=1)

    def text(self, tokens: NDArray[np.int64]) -> str:
        shown = ("".join(map(str, self._permutations[t - 1])) if t else "." for t in tokens)
        return " ".join(shown)
