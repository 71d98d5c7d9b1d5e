"""List ranking: follow pointers to the end of a linked list, from every node at once.

Token i is next(i), the last node points to itself; the answer at i is the number of hops from i to
the end. Tokens: 0 is padding, v + 1 the node or number v. Every hop needs the one before it: a net
that looks once gets as far as its depth, doubling the pointers in every block at best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recurx.errors import bad_argument
from recurx.tasks.base import Examples, Flags, Task, Tokens, hashed_share


@dataclass(frozen=True)
class Chain(Task):
    """One list through all of `length` nodes, stored in random places."""

    length: int = 16
    name: str = "chain"

    # All lists of one length are images of each other, so no split could hold out more.
    held_out_rule = "none of their lists is a training list (all are relabelled images of one list)"

    def __post_init__(self) -> None:
        if self.length < 3:
            raise bad_argument("tasks.chain", "length", "at least 3", self.length)

    @property
    def seq_len(self) -> int:
        return self.length

    @property
    def vocab_size(self) -> int:
        return self.length + 1

    def generate(self, rng: np.random.Generator, count: int) -> Examples:
        order = rng.permuted(np.tile(np.arange(self.length), (count, 1)), axis=1)
        follower = np.concatenate([order[:, 1:], order[:, -1:]], axis=1)
        hops = np.broadcast_to(np.arange(self.length)[::-1], order.shape)
        return Examples(_at(order, follower) + 1, _at(order, hops) + 1)

    def augment(self, rng: np.random.Generator, examples: Examples) -> Examples:
        names = rng.permuted(np.tile(np.arange(self.length), (len(examples), 1)), axis=1)
        renamed = np.take_along_axis(names, examples.inputs - 1, axis=1)
        return Examples(_at(names, renamed) + 1, _at(names, examples.answers))

    def held_out(self, examples: Examples) -> Flags:
        return hashed_share(examples.inputs)

    def check(self, inputs: Tokens, answers: Tokens) -> Flags:
        """The end has 0, every other node one more than the node it points to; on a cycle no
        numbers do that."""
        inside = ((inputs >= 1) & (inputs <= self.length)).all(axis=1)
        follower = np.clip(inputs - 1, 0, self.length - 1)
        ends = follower == np.arange(self.length)
        one_more = np.take_along_axis(answers, follower, axis=1) + 1
        return inside & (answers == np.where(ends, 1, one_more)).all(axis=1)

    def text(self, tokens: NDArray[np.int64]) -> str:
        return " ".join("." if token == 0 else str(token - 1) for token in tokens)


def _at(places: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64]:
    """[N, T] with `values` at `places`, each row a permutation."""
    out = np.empty_like(places)
    np.put_along_axis(out, places, values, axis=1)
    return out
