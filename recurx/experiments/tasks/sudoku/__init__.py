"""Sudoku at 4x4, 6x6 and 9x9: generated, read from files, checked by the rules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recurx.errors import bad_argument
from recurx.experiments.tasks.sudoku import generate, split, symmetry
from recurx.experiments.tasks.sudoku.layout import (
    Layout,
    board_text,
    is_solution,
    to_boards,
    to_tokens,
)
from recurx.experiments.tasks.sudoku.solver import possible, propagate, solve
from recurx.tasks.base import Examples, Flags, Grid, Task, Tokens, hashed_share

if TYPE_CHECKING:
    from torch import Tensor

HELD_OUT_SHARE = 6  # one sixth of the keys: 2 of the 12 kinds of 4x4 boards


@dataclass(frozen=True)
class Sudoku(Task):
    """Sudoku of one size.

    Args:
        size: 4, 6 or 9 cells a side.
        clues: generate puzzles with this many clues; None takes clues away while one solution
            remains.
        max_guesses: difficulty of generated puzzles; 0 keeps to those that singles solve.
    """

    size: int = 9
    clues: int | None = None
    max_guesses: int | None = None
    name: str = "sudoku"

    blank = 1
    counts = True

    def __post_init__(self) -> None:
        Layout.of(self.size)  # refuses unknown sizes

    @property
    def layout(self) -> Layout:
        return Layout.of(self.size)

    @property
    def seq_len(self) -> int:
        return self.layout.cells

    @property
    def vocab_size(self) -> int:
        return self.size + 2

    @property
    def pool(self) -> int:
        return {4: 4096, 6: 2048, 9: 1000}[self.size]  # 1, 4 and 15 seconds

    @property
    def grid(self) -> Grid:
        """Cells that share a row, a column or a box are neighbours."""
        units = self.layout.units_of_cell
        shared = (units[:, :, None] == units[:, None, :]).any(axis=0)
        return Grid(units, shared & ~np.eye(self.seq_len, dtype=bool))

    @property
    def held_out_rule(self) -> str:
        if self.size == 4:
            return (
                "their solved boards, up to naming the digits, are 2 of the 12 that exist, "
                "and training uses the other 10"
            )
        return "no symmetric image of their solved boards is the solved board of a training puzzle"

    def generate(self, rng: np.random.Generator, count: int) -> Examples:
        puzzles, answers = generate.puzzles(self.layout, rng, count, self.clues, self.max_guesses)
        return Examples(to_tokens(puzzles), to_tokens(answers))

    def augment(self, rng: np.random.Generator, examples: Examples) -> Examples:
        puzzles, answers = symmetry.random_images(
            self.layout, rng, to_boards(examples.inputs), to_boards(examples.answers)
        )
        return Examples(to_tokens(puzzles), to_tokens(answers))

    def held_out(self, examples: Examples) -> Flags:
        answers = to_boards(examples.answers)
        if self.size == 4:  # there are two orbits only, so the split is finer: by kind of board
            first_row = np.argsort(answers[:, : self.size], axis=1)
            return hashed_share(np.take_along_axis(first_row, answers - 1, axis=1), HELD_OUT_SHARE)
        return hashed_share(symmetry.orbit_key(self.layout, answers), HELD_OUT_SHARE)

    def split_file(self, path: str | Path, hold_out: int, **how: Any) -> split.PuzzleSplit:
        return split.load(self.layout, path, hold_out, **how)

    def check(self, inputs: Tokens, answers: Tokens) -> Flags:
        return is_solution(self.layout, to_boards(inputs), to_boards(answers))

    def possible(self, inputs: Tensor) -> Tensor:
        """What naked and hidden singles leave."""
        import torch

        boards = to_boards(inputs.cpu().numpy())
        sets, dead = propagate(self.layout, possible(self.layout, boards))
        digits = (sets.T[:, :, None] >> np.arange(self.size) & 1).astype(bool)
        digits &= ~dead[:, None, None]
        left = np.zeros((*boards.shape, self.vocab_size), dtype=bool)
        left[:, :, 2:] = digits
        return torch.from_numpy(left).to(inputs.device)

    def count(self, inputs: Tensor, most: int) -> Tensor:
        """By singles and guesses (recurx/experiments/tasks/sudoku/solver.py)."""
        import torch

        solved = solve(self.layout, to_boards(inputs.cpu().numpy()), limit=2, most=most)
        counts = np.where(solved.complete, solved.count, -1)
        return torch.from_numpy(counts).to(inputs.device)

    def text(self, tokens: NDArray[np.int64]) -> str:
        return board_text(self.layout, to_boards(tokens))

    def examples(self, puzzles: NDArray[np.int64]) -> Examples:
        """Examples from puzzles [N, cells] without answers: the solver finds them.

        Raises:
            InvalidArgument: a puzzle has no solution, or more than one.
        """
        solved = solve(self.layout, puzzles)
        wrong = np.flatnonzero(solved.count != 1)
        if len(wrong):
            got = "none" if solved.count[wrong[0]] == 0 else "more than one"
            raise bad_argument(
                "tasks.sudoku", "puzzles", "exactly one solution each",
                f"{got} for puzzle {wrong[0] + 1} ({len(wrong)} of {len(puzzles)} are wrong)",
            )  # fmt: skip
        return Examples(to_tokens(puzzles), to_tokens(solved.boards))
