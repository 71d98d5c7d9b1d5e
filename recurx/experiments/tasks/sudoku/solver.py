"""Solves many Sudokus at once: constraint propagation on bit sets, then guesses.

A position is a column of bit sets [cells, N] uint16, bit d - 1 set while digit d is possible, so
that one numpy operation serves a thousand boards. NOTE: as 0/1 tables and matrix products the same
search took 17 (4x4) to 38 (9x9, 17 clues) times as long.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recurx.experiments.tasks.sudoku.layout import Boards, Layout
from recurx.tasks.base import Flags

Sets = NDArray[np.uint16]  # [cells, N] possible digits as bits

CHUNK = 2048  # boards worked on at once: 330 KB of 9x9 sets stay in L2, and the stack stays small
BITS = np.array([bin(mask).count("1") for mask in range(1 << 9)], dtype=np.int8)


@dataclass(frozen=True)
class Solved:
    """What the solver found for N puzzles.

    Args:
        count: [N] number of solutions, counted up to the limit.
        boards: [N, cells] the first solution found, zeros where there is none.
        guesses: [N] positions at which propagation was stuck and a digit had to be guessed; 0 says
            that naked and hidden singles alone solve the puzzle.
        complete: [N] whether the search came to its end, or to the limit: `count` is exact.
    """

    count: NDArray[np.int64]
    boards: Boards
    guesses: NDArray[np.int64]
    complete: Flags


def possible(layout: Layout, boards: Boards) -> Sets:
    """The given digit where there is one, every digit elsewhere."""
    every = (1 << layout.size) - 1
    given = boards.T
    return np.where(given == 0, every, 1 << np.maximum(given - 1, 0)).astype(np.uint16)


def boards_of(sets: Sets) -> Boards:
    """Digits [N, cells] of solved positions."""
    digit = np.zeros(1 << 9, dtype=np.int64)
    digit[1 << np.arange(9)] = np.arange(1, 10)
    return digit[sets].T


def propagate(layout: Layout, sets: Sets) -> tuple[Sets, Flags]:
    """Apply naked and hidden singles until nothing changes.

    Returns:
        The reduced sets, and which of the N positions contradict themselves.
    """
    out, dead = sets.copy(), np.zeros(sets.shape[1], dtype=bool)
    active = np.arange(sets.shape[1])
    while len(active):
        before = out[:, active]
        after, dead[active] = _singles_once(layout, before)
        out[:, active] = after
        active = active[(after != before).any(axis=0) & ~dead[active]]
    return out, dead


def _singles_once(layout: Layout, sets: Sets) -> tuple[Sets, Flags]:
    every = (1 << layout.size) - 1
    single = np.where(BITS[sets] == 1, sets, 0).astype(np.uint16)
    placed, placed_twice = _once_and_twice(single[layout.units])
    sets = np.where(single != 0, sets, sets & ~_seen(layout, placed)).astype(np.uint16)

    offered, offered_twice = _once_and_twice(sets[layout.units])
    hidden = sets & _seen(layout, offered & ~offered_twice)
    sets = np.where(hidden != 0, hidden, sets)
    dead = (placed_twice != 0).any(axis=0) | (offered != every).any(axis=0)
    return sets, dead


def _once_and_twice(in_units: NDArray[np.uint16]) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """From [units, S, N]: the bits set in some cell of a unit, and those set in two or more."""
    once = np.zeros_like(in_units[:, 0])
    twice = np.zeros_like(once)
    for cell in range(in_units.shape[1]):
        twice |= once & in_units[:, cell]
        once |= in_units[:, cell]
    return once, twice


def _seen(layout: Layout, of_units: NDArray[np.uint16]) -> Sets:
    """From [units, N]: for each cell the union over its row, column and box."""
    row, column, box = layout.units_of_cell
    return of_units[row] | of_units[column] | of_units[box]


def solve(layout: Layout, boards: Boards, limit: int = 2, most: int | None = None) -> Solved:
    """Count solutions up to `limit` (2 tells whether a puzzle has exactly one) and give one.

    Args:
        most: guesses after which a puzzle is given up.
    """
    boards = np.asarray(boards, dtype=np.int64).reshape(-1, layout.cells)
    count = np.zeros(len(boards), dtype=np.int64)
    guesses = np.zeros(len(boards), dtype=np.int64)
    found = np.zeros_like(boards)
    stack = _chunks(possible(layout, boards), np.arange(len(boards)))
    while stack:
        sets, root = stack.pop()
        wanted = count[root] < limit
        if most is not None:
            wanted &= guesses[root] <= most
        sets, root = sets[:, wanted], root[wanted]
        sets, dead = propagate(layout, sets)
        solved = (BITS[sets] == 1).all(axis=0) & ~dead
        first, at = np.unique(root[solved], return_index=True)
        new = count[first] == 0
        found[first[new]] = boards_of(sets[:, solved][:, at[new]])
        np.add.at(count, root[solved], 1)
        stuck = ~solved & ~dead
        np.add.at(guesses, root[stuck], 1)
        stack += _chunks(*_branch(sets[:, stuck], root[stuck]))
    complete = np.ones(len(boards), dtype=bool) if most is None else guesses <= most
    return Solved(np.minimum(count, limit), found, guesses, complete | (count >= limit))


def _chunks(sets: Sets, root: NDArray[np.int64]) -> list[tuple[Sets, NDArray[np.int64]]]:
    starts = range(0, len(root), CHUNK)
    return [(sets[:, i : i + CHUNK], root[i : i + CHUNK]) for i in starts]


def _branch(sets: Sets, root: NDArray[np.int64]) -> tuple[Sets, NDArray[np.int64]]:
    """Each position once for every digit of its open cell with the fewest possible digits."""
    options = BITS[sets]
    cell = np.where(options > 1, options, np.int8(10)).argmin(axis=0)
    chosen = sets[cell, np.arange(len(root))]
    position, digit = np.nonzero(chosen[:, None] >> np.arange(9, dtype=np.uint16) & 1)
    sets = sets[:, position]
    sets[cell[position], np.arange(len(position))] = 1 << digit
    return sets, root[position]
