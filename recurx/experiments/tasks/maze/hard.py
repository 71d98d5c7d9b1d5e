"""Mazes with walls in random places and long shortest paths: made in thousands, few kept.

A row of a maze is one integer with a bit a cell, so that a step of a search in all mazes is a few
operations on [N, S] integers; what is kept pays for the exact distances.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recurx.errors import RecurxError
from recurx.experiments.tasks.maze.paths import Cells, Grids, distances

Rows = NDArray[np.uint64]  # [N, S], bit c of row r is cell (r, c)

MOST_COLUMNS = 63
# Share of walls. Measured at 30x30: the longest shortest paths come between 0.3 and 0.4; with more,
# mazes fall apart.
WALLS = (0.32, 0.40)
AT_ONCE = 2048
MOST_ROUNDS = 50  # without a single maze


def mazes(
    rng: np.random.Generator, count: int, size: int, shortest: int
) -> tuple[Grids, Cells, Cells]:
    """`count` mazes [N, S, S] of passable cells, with start and goal at least `shortest` apart.

    Raises:
        RecurxError: no maze of this size has so long a path, as far as 100,000 tries tell.
    """
    none = np.zeros(0, dtype=np.int64)
    found: list[tuple[Grids, Cells, Cells]] = [(np.zeros((0, size, size), bool), none, none)]
    missing, fruitless = count, 0
    while missing > 0:
        passable = rng.random((AT_ONCE, size, size)) >= rng.uniform(*WALLS, size=(AT_ONCE, 1, 1))
        far, longest = _farthest(_as_rows(passable), _random_cell(rng, passable))
        far, longest = _farthest(_as_rows(passable), far)
        kept = np.flatnonzero(longest >= shortest)[:missing]
        fruitless = 0 if len(kept) else fruitless + 1
        if fruitless == MOST_ROUNDS:
            raise RecurxError(
                f"recurx.tasks.maze: no {size}x{size} maze among {MOST_ROUNDS * AT_ONCE:,} has a "
                f"shortest path of {shortest} steps: ask for fewer."
            )
        found.append(_with_ends(rng, passable[kept], far[kept], shortest))
        missing -= len(kept)
    grids, starts, goals = zip(*found, strict=True)
    return np.concatenate(grids), np.concatenate(starts), np.concatenate(goals)


def _with_ends(
    rng: np.random.Generator, passable: Grids, end: Cells, shortest: int
) -> tuple[Grids, Cells, Cells]:
    """`end` and a random cell that is far enough from it, in random order."""
    steps = distances(passable, end)
    other = np.where(steps >= shortest, rng.random(steps.shape), -1).argmax(axis=1)
    swap = rng.random(len(end)) < 0.5
    return passable, np.where(swap, other, end), np.where(swap, end, other)


def _random_cell(rng: np.random.Generator, passable: Grids) -> Cells:
    flat = passable.reshape(len(passable), -1)
    return np.where(flat, rng.random(flat.shape), -1).argmax(axis=1)


def _as_rows(passable: Grids) -> Rows:
    bits = np.uint64(1) << np.arange(passable.shape[2], dtype=np.uint64)
    return (passable * bits).sum(axis=2, dtype=np.uint64)


def _farthest(passable: Rows, start: Cells) -> tuple[Cells, NDArray[np.int64]]:
    """[N] a cell that is farthest from `start`, and how far it is."""
    count, size = passable.shape
    one = np.uint64(1)
    front = np.zeros_like(passable)
    front[np.arange(count), start // size] = one << (start % size).astype(np.uint64)
    free, last = passable & ~front, front.copy()
    longest, distance = np.zeros(count, dtype=np.int64), 0
    while True:
        grown = (front << one) | (front >> one)
        grown[:, 1:] |= front[:, :-1]
        grown[:, :-1] |= front[:, 1:]
        front = grown & free
        going_on = front.any(axis=1)
        if not going_on.any():
            break
        distance += 1
        free &= ~front
        last[going_on], longest[going_on] = front[going_on], distance
    row = (last != 0).argmax(axis=1)
    bits = last[np.arange(count), row]
    lowest = bits & (~bits + one)  # exact in a float64, and so is its logarithm
    column = np.log2(lowest.astype(np.float64)).astype(np.int64)
    return row * size + column, longest
