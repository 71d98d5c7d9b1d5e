"""Symmetries of Sudoku: random ones to augment with, and an invariant that splits honestly."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from recurx.experiments.tasks.sudoku.layout import Boards, Layout


def random_images(
    layout: Layout, rng: np.random.Generator, puzzles: Boards, answers: Boards
) -> tuple[Boards, Boards]:
    """Each pair of rows [N, cells] under its own random symmetry.

    Digits are relabelled; bands, rows in a band, stacks and columns in a stack are shuffled;
    square boxes allow transposing. (The published augmentation of Sudoku-Extreme.)
    """
    count, size = len(puzzles), layout.size
    rows = _shuffled_lines(rng, count, size // layout.box_rows, layout.box_rows)
    columns = _shuffled_lines(rng, count, size // layout.box_cols, layout.box_cols)
    cells = rows[:, :, None] * size + columns[:, None, :]
    if layout.box_rows == layout.box_cols:
        turn = rng.random(count) < 0.5
        cells = np.where(turn[:, None, None], cells.transpose(0, 2, 1), cells)
    cells = cells.reshape(count, layout.cells)
    relabel = np.zeros((count, size + 1), dtype=np.int64)  # a blank stays a blank
    relabel[:, 1:] = rng.permuted(np.tile(np.arange(1, size + 1), (count, 1)), axis=1)

    def image(boards: Boards) -> Boards:
        return np.take_along_axis(relabel, np.take_along_axis(boards, cells, axis=1), axis=1)

    return image(puzzles), image(answers)


def _shuffled_lines(
    rng: np.random.Generator, count: int, bands: int, lines: int
) -> NDArray[np.int64]:
    """[count, bands * lines]: bands shuffled, and the lines inside each band."""
    outer = rng.permuted(np.tile(np.arange(bands), (count, 1)), axis=1)
    inner = rng.permuted(np.tile(np.arange(lines), (count, bands, 1)), axis=2)
    return (outer[:, :, None] * lines + inner).reshape(count, bands * lines)


def orbit_key(layout: Layout, answers: Boards) -> NDArray[np.int64]:
    """[N, K] numbers that every symmetric image of a solved board shares.

    Two rows of a solved board define a permutation of the digits; its cycle type survives
    relabelling and every shuffle of columns, and that of its inverse is the same. The sorted
    types of all pairs of rows in a band, and of columns in a stack, therefore depend on the
    orbit alone. Boards of different orbits may share a key; images of one board always do.
    """
    size = layout.size
    boards = answers.reshape(-1, size, size)
    by_rows = _line_key(boards, layout.box_rows)
    by_columns = _line_key(boards.transpose(0, 2, 1), layout.box_cols)
    if layout.box_rows != layout.box_cols:
        return np.concatenate([by_rows, by_columns], axis=1)
    swap = _lexicographically_less(by_columns, by_rows)[:, None]  # transposing is a symmetry
    first = np.where(swap, by_columns, by_rows)
    return np.concatenate([first, np.where(swap, by_rows, by_columns)], axis=1)


def _line_key(boards: NDArray[np.int64], lines: int) -> NDArray[np.int64]:
    """Sorted cycle types of all pairs of rows that lie in one band; [N, pairs]."""
    position = np.argsort(boards, axis=2)  # of each digit in each row
    types = [
        _cycle_type(np.take_along_axis(boards[:, b] - 1, position[:, a], axis=1))
        for a, b in combinations(range(boards.shape[1]), 2)
        if a // lines == b // lines
    ]
    return np.sort(np.stack(types, axis=1), axis=1)


def _cycle_type(permutation: NDArray[np.int64]) -> NDArray[np.int64]:
    """[N] one number a cycle type: the fixed points of the first powers, as digits of base S+1."""
    count, size = permutation.shape
    power, code = permutation, np.zeros(count, dtype=np.int64)
    identity = np.arange(size)
    for _ in range(size):
        code = code * (size + 1) + (power == identity).sum(axis=1)
        power = np.take_along_axis(permutation, power, axis=1)
    return code


def _lexicographically_less(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.bool_]:
    differs = a != b
    first = differs.argmax(axis=1)
    rows = np.arange(len(a))
    return differs.any(axis=1) & (a[rows, first] < b[rows, first])
