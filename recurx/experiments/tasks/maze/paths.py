"""Breadth-first search in many square mazes at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Grids = NDArray[np.bool_]  # [N, S, S]
Cells = NDArray[np.int64]  # [N] row * S + column
UNREACHED = -1
BORDER = ((0, 0), (1, 1), (1, 1))


def distances(passable: Grids, start: Cells) -> NDArray[np.int64]:
    """[N, S*S] steps from `start` through passable cells; UNREACHED where no way leads.

    `start` counts as reached, passable or not.
    """
    count, size, _ = passable.shape
    steps = np.full((count, size * size), UNREACHED, dtype=np.int64)
    # A border that is never passable, so that shifts need no edge cases.
    free = np.pad(passable, BORDER)
    front = np.zeros_like(free)
    front[np.arange(count), start // size + 1, start % size + 1] = True
    distance = 0
    while front.any():
        free &= ~front
        steps[front[:, 1:-1, 1:-1].reshape(count, -1)] = distance
        grown = np.zeros_like(front)
        grown[:, 1:] |= front[:, :-1]
        grown[:, :-1] |= front[:, 1:]
        grown[:, :, 1:] |= front[:, :, :-1]
        grown[:, :, :-1] |= front[:, :, 1:]
        front, distance = grown & free, distance + 1
    return steps


def trace_back(steps: NDArray[np.int64], goal: Cells, rng: np.random.Generator) -> Grids:
    """[N, S*S] the cells of one shortest path from the start of `steps` to `goal`, both included;
    where several neighbours are one step nearer, a random one of the four directions goes first.

    Every `goal` must be reached.
    """
    count, cells = steps.shape
    size = int(np.sqrt(cells))
    padded = np.pad(steps.reshape(count, size, size), BORDER, constant_values=UNREACHED)
    flat = padded.reshape(count, (size + 2) ** 2)
    here = (goal // size + 1) * (size + 2) + goal % size + 1
    path = np.zeros(flat.shape, dtype=bool)
    rows = np.arange(count)
    moves = np.array([1, -1, size + 2, -size - 2])
    for _ in range(int(steps[rows, goal].max(initial=0)) + 1):
        path[rows, here] = True
        around = here[:, None] + moves[rng.permuted(np.tile(np.arange(4), (count, 1)), axis=1)]
        nearer = flat[rows[:, None], around] == (flat[rows, here] - 1)[:, None]
        nearer &= (flat[rows, here] > 0)[:, None]
        step = around[rows, nearer.argmax(axis=1)]
        here = np.where(nearer.any(axis=1), step, here)
    return path.reshape(count, size + 2, size + 2)[:, 1:-1, 1:-1].reshape(count, cells)
