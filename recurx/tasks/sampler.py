"""A seeded, endless stream of examples of one side of the split, that can be saved and resumed."""

from __future__ import annotations

import functools

import numpy as np

from recurx.errors import RecurxError, bad_argument
from recurx.tasks.base import Examples, Stream, Task

SPLITS = ("train", "held-out")
MOST_ROUNDS = 1000  # of candidates before the sampler gives up on an (almost) empty side


class Sampler(Stream):
    """Draws examples of `task`: all fresh, or symmetric images of a pool generated once.

    Every drawn example is tested for its side of the split after augmentation, so that training
    never sees a held-out one. The pool follows from `seed`, so the state to save is small.

    Args:
        task: what to draw.
        seed: all randomness follows from it; the two splits of one seed draw independently.
        split: "train" or "held-out".
    """

    def __init__(self, task: Task, seed: int = 0, split: str = "train") -> None:
        if split not in SPLITS:
            raise bad_argument("tasks.Sampler", "split", f"one of {SPLITS}", repr(split))
        self.task, self.split = task, split
        self._rng = np.random.default_rng([seed, SPLITS.index(split)])
        self._pool = _pool(task, seed) if task.pool else None

    def draw(self, count: int) -> Examples:
        """The next `count` examples."""
        parts: list[Examples] = []
        for _ in range(MOST_ROUNDS):
            missing = count - sum(map(len, parts))
            if missing <= 0 and parts:
                return Examples.join(parts).take(np.arange(count))
            found = self._candidates(2 * missing)
            parts.append(found.take(self.task.held_out(found) == (self.split == "held-out")))
        raise RecurxError(
            f"recurx.tasks.Sampler: {self.task.name} has almost no {self.split} examples "
            f"({sum(map(len, parts))} found in {MOST_ROUNDS} rounds of {2 * count} candidates)."
        )

    def draw_distinct(self, count: int) -> Examples:
        """At most `count` examples, no two with the same input: for a test set."""
        drawn = self.draw(4 * count)
        _, first = np.unique(drawn.inputs, axis=0, return_index=True)
        return drawn.take(np.sort(first)[:count])

    def _candidates(self, count: int) -> Examples:
        if self._pool is None:
            return self.task.candidates(self._rng, count, self.split)
        picked = self._pool.take(self._rng.integers(len(self._pool), size=count))
        return self.task.augment(self._rng, picked)


@functools.lru_cache(maxsize=8)  # both splits draw from one pool, and it takes seconds to fill
def _pool(task: Task, seed: int) -> Examples:
    return task.generate(np.random.default_rng(seed), task.pool)
