"""Generates Sudokus with exactly one solution: a random full board, then clues taken away."""

from __future__ import annotations

import numpy as np

from recurx.errors import bad_argument
from recurx.experiments.tasks.sudoku.layout import Boards, Layout
from recurx.experiments.tasks.sudoku.solver import BITS, boards_of, possible, propagate, solve

# Fewest clues with which a puzzle can have one solution: theorems at 4x4 and at 9x9 (arXiv
# 1201.0749), by search at 6x6.
FEWEST_CLUES = {4: 4, 6: 8, 9: 17}


def full_boards(layout: Layout, rng: np.random.Generator, count: int) -> Boards:
    """`count` random solved boards [count, cells]: random digits, singles, restart when stuck."""
    empty = possible(layout, np.zeros((1, layout.cells), dtype=np.int64))
    sets = np.repeat(empty, max(count, 1), axis=1)
    rows = np.arange(sets.shape[1])
    done: list[Boards] = []
    while sum(map(len, done)) < count:
        options = BITS[sets]
        cell = np.where(options > 1, options + rng.random(options.shape), np.inf).argmin(axis=0)
        digits = sets[cell, rows][:, None] >> np.arange(layout.size) & 1
        sets[cell, rows] = 1 << (digits * rng.random(digits.shape)).argmax(axis=1)
        sets, dead = propagate(layout, sets)
        solved = (BITS[sets] == 1).all(axis=0) & ~dead
        done.append(boards_of(sets[:, solved]))
        sets[:, dead | solved] = empty
    return np.concatenate(done)[:count]


def puzzles(
    layout: Layout,
    rng: np.random.Generator,
    count: int,
    clues: int | None = None,
    max_guesses: int | None = None,
) -> tuple[Boards, Boards]:
    """`count` puzzles with exactly one solution, and those solutions; both [count, cells].

    Args:
        clues: stop taking clues away at this many; None goes on until every clue is needed.
        max_guesses: difficulty: 0 keeps to puzzles that naked and hidden singles solve, None
            takes whatever has one solution.

    Raises:
        InvalidArgument: `clues` is below the fewest that any puzzle of this size can have.
    """
    fewest = FEWEST_CLUES[layout.size]
    if clues is not None and not fewest <= clues <= layout.cells:
        raise bad_argument(
            "tasks.sudoku", "clues", f"{fewest}..{layout.cells} at this size", repr(clues)
        )
    answers = full_boards(layout, rng, count)
    boards = answers.copy()
    order = rng.permuted(np.tile(np.arange(layout.cells), (count, 1)), axis=1)
    for cell in order.T:
        rows = np.arange(count)
        if clues is not None:
            rows = rows[(boards != 0).sum(axis=1) > clues]
        if len(rows) == 0:
            break
        trial = boards[rows]
        trial[np.arange(len(rows)), cell[rows]] = 0
        solved = solve(layout, trial)
        good = solved.count == 1
        if max_guesses is not None:
            good &= solved.guesses <= max_guesses
        boards[rows[good]] = trial[good]
    return boards, answers
