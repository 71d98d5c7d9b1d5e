"""The options of `python -m recurx demo`."""

from __future__ import annotations

from dataclasses import dataclass

from recurx.cli import options
from recurx.options import file, option


@dataclass(frozen=True)
class Options(options.Json, options.Machine):
    puzzle: tuple[str, ...] = option(
        (), "9x9 puzzles for the full-size model, 81 characters each, 0 or . for a blank",
        flag="", nargs="*",
    )  # fmt: skip
    puzzle_line: str | None = option(
        None, "only this: the net that comes with recurx solves this 9x9 puzzle, step by step",
        flag="--puzzle", metavar="LINE",
    )  # fmt: skip
    puzzles: str | None = file("a file of such lines, or a CSV")
    checkpoint: str | None = file("trained weights of 9x9 Sudoku: for the full-size model (random "
                                  "without), and for --puzzle")  # fmt: skip
    time_budget: float = options.time(90.0, "for the training at most")
    out: str = option("runs/demo", "of the training", metavar="FOLDER")
    no_compile: bool = option(False, "leave torch.compile out")
    seed: int = option(0, "of the training, and of random weights")
