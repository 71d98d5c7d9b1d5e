"""The symmetries under which an ARC task remains one: turns and reflections, renamed colours.

Black (0) keeps its name. A task gets a fixed list of augmentations, the first of which changes
nothing; each has its own row in the puzzle embedding, so the list must be the same in every
process and under every version of NumPy: it follows from the task's id by splitmix64 alone.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recurx.experiments.tasks.arc.canvas import COLOURS, Grid

# The symmetries of the square as (quarter turns, then whether to transpose).
SYMMETRIES = tuple((turns, flip) for flip in (False, True) for turns in range(4))
TRIES = 5  # candidates an augmentation, as published: small palettes have few different ones


@dataclass(frozen=True)
class Augmentation:
    """Turn `symmetry` (an index of SYMMETRIES), and colour c becomes colours[c]."""

    symmetry: int
    colours: tuple[int, ...]

    def apply(self, grid: Grid) -> Grid:
        turns, flip = SYMMETRIES[self.symmetry]
        turned = np.rot90(np.asarray(self.colours, dtype=np.uint8)[grid], turns)
        return turned.T if flip else turned

    def undo(self, grid: Grid) -> Grid:
        turns, flip = SYMMETRIES[self.symmetry]
        names = np.argsort(self.colours).astype(np.uint8)
        return np.rot90(names[grid.T if flip else grid], -turns)


IDENTITY = Augmentation(0, tuple(range(COLOURS)))


def augmentations(task_id: str, used: NDArray[np.bool_], count: int) -> list[Augmentation]:
    """IDENTITY and at most `count` others that treat the colours in use [10] differently."""
    seed = np.uint64(zlib.crc32(task_id.encode())) << np.uint64(32)
    draws = _splitmix64(seed + np.arange(TRIES * count * COLOURS, dtype=np.uint64))
    draws = draws.reshape(-1, COLOURS)
    colours = np.zeros((len(draws), COLOURS), dtype=np.int64)
    colours[:, 1:] = draws[:, 1:].argsort(axis=1, kind="stable") + 1
    symmetry = (draws[:, :1] % np.uint64(len(SYMMETRIES))).astype(np.int64)
    start = np.array([[0, *IDENTITY.colours]])
    every = np.concatenate([start, np.concatenate([symmetry, colours], axis=1)])
    what_matters = every * np.concatenate([[True], used])
    keys = what_matters @ 10 ** np.arange(1 + COLOURS)  # digits of one number
    _, first = np.unique(keys, return_index=True)
    rows = every[np.sort(first)[: count + 1]].tolist()
    return [Augmentation(row[0], tuple(row[1:])) for row in rows]


def _splitmix64(counters: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mixed = (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
