"""Sizes, tokens and rules of Sudoku.

A board is a row of S*S digits, 0 for a blank. As tokens (the convention of the official TRM and
HRM data sets): 0 is padding, 1 a blank, d + 1 the digit d; so 9x9 has 11 token ids.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recurx.errors import bad_argument
from recurx.tasks.base import Flags, Tokens

Boards = NDArray[np.int64]  # [N, S*S] digits, 0 for a blank

BOX_SHAPES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}


@dataclass(frozen=True)
class Layout:
    """A board of `size` x `size` cells in boxes of `box_rows` x `box_cols`."""

    size: int
    box_rows: int
    box_cols: int

    @classmethod
    @functools.cache
    def of(cls, size: int) -> Layout:
        if size not in BOX_SHAPES:
            raise bad_argument("tasks.sudoku", "size", f"one of {sorted(BOX_SHAPES)}", repr(size))
        return cls(size, *BOX_SHAPES[size])

    @property
    def cells(self) -> int:
        return self.size * self.size

    @functools.cached_property
    def units(self) -> NDArray[np.int64]:
        """[3S, S]: the cells of each row, column and box."""
        grid = np.arange(self.cells).reshape(self.size, self.size)
        boxes = grid.reshape(
            self.size // self.box_rows, self.box_rows, self.size // self.box_cols, self.box_cols
        )
        boxes = boxes.transpose(0, 2, 1, 3).reshape(self.size, self.size)
        return np.concatenate([grid, grid.T, boxes])

    @functools.cached_property
    def units_of_cell(self) -> NDArray[np.int64]:
        """[3, cells]: which row, column and box (as indices into `units`) a cell lies in."""
        table = np.empty((3, self.cells), dtype=np.int64)
        for unit, cells in enumerate(self.units):
            table[unit // self.size, cells] = unit
        return table

    def twice(self, board: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[cells] whether a cell's digit stands a second time in its row, column or box."""
        found = np.zeros(self.cells, dtype=bool)
        for unit in self.units:
            digits = board[unit]
            found[unit] |= ((digits[:, None] == digits).sum(axis=1) > 1) & (digits > 0)
        return found


def to_tokens(boards: Boards) -> Tokens:
    return np.asarray(boards, dtype=np.int64) + 1


def to_boards(tokens: Tokens) -> Boards:
    """Digits of token rows; padding and blanks become 0."""
    return np.maximum(np.asarray(tokens, dtype=np.int64) - 1, 0)


def is_solution(layout: Layout, puzzles: Boards, answers: Boards) -> Flags:
    """Whether each answer [N, S*S] keeps the givens and has every digit once in every unit."""
    keeps_givens = ((puzzles == 0) | (puzzles == answers)).all(axis=1)
    digits = np.arange(1, layout.size + 1)
    complete = (np.sort(answers[:, layout.units], axis=-1) == digits).all(axis=(1, 2))
    return keeps_givens & complete


def board_text(layout: Layout, board: NDArray[np.int64]) -> str:
    """The board with its boxes drawn in ASCII; a dot is a blank."""
    boxes = layout.size // layout.box_cols
    symbols = np.array([*".123456789"])[board].reshape(layout.size, boxes, layout.box_cols)
    lines = [" | ".join(map(" ".join, row)) for row in symbols.tolist()]
    for row in range(layout.size - layout.box_rows, 0, -layout.box_rows):
        lines.insert(row, "+".join(["-" * (2 * layout.box_cols + 1)] * boxes)[1:-1])
    return "\n".join(lines)
