"""`python -m recurx solve PUZZLE...`: boards in, boards out."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from recurx.cli import options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from recurx.tasks import Task

UNSOLVED = 1  # exit code when an answer breaks a rule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("puzzle", nargs="*", help="a board row after row, 0 or . for a blank")
    parser.add_argument("--puzzles", metavar="FILE", help="a file of such lines, or a CSV")
    options.add_checkpoint(parser)
    parser.add_argument("--show", type=options.positive, default=10, metavar="N",
                        help="print at most N boards (default 10)")  # fmt: skip
    options.add_refinement(parser)
    options.add_machine(parser)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(arguments: argparse.Namespace) -> int:
    import torch

    import recurx
    from recurx.cli import output
    from recurx.cli.checkpoints import open_checkpoint
    from recurx.errors import InvalidArgument
    from recurx.tasks.sudoku.layout import to_boards

    device = options.prepare_machine(arguments)
    if bool(arguments.puzzle) == bool(arguments.puzzles):
        raise InvalidArgument("give puzzles as arguments, or a file with --puzzles (one of both).")
    name = None if arguments.checkpoint else _task_of(arguments)
    model, task, loaded = open_checkpoint(arguments.checkpoint, name, device, arguments.backend)
    inputs = _inputs(arguments, task)
    how = options.refinement(arguments, loaded.extra.get("solve"), task)
    answers = recurx.solve(model, {"inputs": torch.from_numpy(inputs).to(device)}, **how)
    predictions = answers.predictions.cpu().numpy()
    right = task.check(inputs, predictions)
    console = output.make_console()
    for row in range(min(arguments.show, len(inputs))):
        verdict = "solved" if right[row] else "not solved: the answer breaks a rule or a given"
        steps = int(answers.steps[row])
        console.print(f"puzzle {row + 1}: {verdict}, {steps} step{'s' if steps > 1 else ''}")
        boards = [task.text(inputs[row]), task.text(predictions[row])]
        console.print(output.side_by_side(boards), markup=False)
    console.print(f"{int(right.sum())} of {len(inputs)} solved")
    if arguments.json:
        lines = ["".join(map(str, board)) for board in to_boards(predictions).tolist()]
        output.json_line(
            {"solved": right.tolist(), "answers": lines, "steps": answers.steps.tolist()}
        )
    return 0 if right.all() else UNSOLVED


def _task_of(arguments: argparse.Namespace) -> str:
    """The Sudoku that the first puzzle has the length of; 9x9 if of none, which is then told."""
    from recurx.cli.checkpoints import SUDOKU_OF_LENGTH
    from recurx.tasks.sudoku import files

    if arguments.puzzles:
        first = files.first_puzzle(arguments.puzzles)
    else:
        first = arguments.puzzle[0].strip()
    return SUDOKU_OF_LENGTH.get(len(first), "sudoku")


def _inputs(arguments: argparse.Namespace, task: Task) -> NDArray[np.int64]:
    """Token ids [N, T] of the puzzles given as arguments or in a file."""
    from recurx.errors import InvalidArgument
    from recurx.tasks import Sudoku
    from recurx.tasks.sudoku import files
    from recurx.tasks.sudoku.layout import to_tokens

    if not isinstance(task, Sudoku):
        raise InvalidArgument(f"this checkpoint is for {task.name}: use eval for other tasks.")
    if arguments.puzzles:
        return to_tokens(files.read(arguments.puzzles, task.layout).puzzles)
    return to_tokens(files.parse_boards(arguments.puzzle, task.layout))
