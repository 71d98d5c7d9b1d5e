"""The demo's last part: the 9x9 net that comes with recurx solves a puzzle, or the one you type."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

import recurx
from recurx.errors import InvalidArgument
from recurx.experiments.answering.checkpoints import open_checkpoint
from recurx.experiments.answering.refinement import by_rules
from recurx.experiments.demo.learn import show_boards
from recurx.experiments.demo.options import Options
from recurx.experiments.tasks import Sudoku
from recurx.experiments.tasks.sudoku import files, solver
from recurx.experiments.tasks.sudoku.layout import Layout, to_tokens

MOST_BOARDS = 4  # of 21 columns beside each other in 100
LEAST_STEPS = 64  # deeper than in training: who waits for one board can wait for these


def open_net(asked: Options, device: torch.device) -> tuple[Any, Sudoku, dict[str, Any]]:
    """Model, task, and the arguments of `recurx.solve` that the net recommends: of the user's
    checkpoint, or of the shipped one.

    Raises:
        InvalidArgument: no net ships, or the user's is for another task.
        CheckpointError, FileNotFoundError: of `load_checkpoint`.
    """
    model, task, loaded = open_checkpoint(asked.checkpoint, "sudoku", device, asked.backend)
    assert isinstance(task, Sudoku)
    return model, task, by_rules(loaded.extra.get("solve", {}), task)


def solve_typed(console: Console, asked: Options, device: torch.device) -> bool:
    """Solve `--puzzle LINE`, and whether that went well."""
    board = files.parse_boards([asked.puzzle_line], Layout.of(9))[0]
    model, task, how = open_net(asked, device)
    return fill(console, model, task, board, how)


def fill(
    console: Console, model: Any, task: Sudoku, board: NDArray[np.int64], how: dict[str, Any]
) -> bool:
    """Show a board [81] after some of its supervision steps; whether it is solved at the end.

    Args:
        how: arguments of `recurx.solve` that the net recommends.
    """
    puzzle = to_tokens(board)
    device = next(model.parameters()).device
    batch = {"inputs": torch.from_numpy(puzzle[None]).to(device)}
    steps = max(LEAST_STEPS, how.get("max_steps", 0))
    answers = recurx.solve(model, batch, **{**how, "max_steps": steps, "trace": True})
    assert answers.trace is not None
    trace = answers.trace[:, 0].cpu().numpy()
    right = task.check(np.broadcast_to(puzzle, trace.shape), trace)
    last = int(right.argmax()) + 1 if right[-1] else int(answers.steps[0])
    found = solver.solve(task.layout, board[None])
    unique = found.count[0] == 1
    shown = sorted({int(step) for step in np.linspace(1, last, MOST_BOARDS - 1).round()})
    states = [puzzle, *(trace[step - 1] for step in shown)]
    show_boards(console, task, states, to_tokens(found.boards[0]) if unique else None)
    known = {0: "this puzzle has no solution", 1: "a puzzle of one solution"}
    many = known.get(int(found.count[0]), "a puzzle of several solutions")
    tries = int((answers.rollout_steps > 0).sum())
    which = f", the best of {tries} tries" if tries > 1 else ""
    console.print(
        f"after steps {', '.join(map(str, shown))} of {int(answers.steps[0])}{which}; {many}. "
        + ("Solved." if right[-1] else "Not solved: this net does not solve every puzzle.")
    )
    return bool(right[-1])


def ask(console: Console, model: Any, task: Sudoku, how: dict[str, Any]) -> None:
    """Solve what the user types, if somebody is there to type; an empty line ends it."""
    if sys.stdin is None or not (sys.stdin.isatty() and console.is_terminal):
        return
    while True:
        try:
            text = console.input("A puzzle of yours (81 characters; Enter ends): ").strip()
        except EOFError:
            return
        if not text:
            return
        try:
            board = files.parse_boards([text], task.layout)[0]
        except InvalidArgument as error:
            console.print(str(error))
            continue
        fill(console, model, task, board, how)
