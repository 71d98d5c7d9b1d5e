"""`python -m recurx solve PUZZLE...`: boards in, boards out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from recurx.cli import options
from recurx.errors import InvalidArgument
from recurx.experiments.answering.refinement import Refining, arguments_of_solve
from recurx.options import file, option

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from recurx.tasks import Task

UNSOLVED = 1  # exit code when an answer breaks a rule


@dataclass(frozen=True)
class Options(options.Json, options.Machine, Refining, options.Weights):
    puzzle: tuple[str, ...] = option(
        (), "a board row after row, 0 or . for a blank", flag="", nargs="*"
    )
    puzzles: str | None = file("a file of such lines, or a CSV")
    show: int = option(10, "print at most N boards", least=1)


def run(asked: Options) -> int:
    import torch

    import recurx
    from recurx.cli import output
    from recurx.experiments.answering.checkpoints import open_checkpoint
    from recurx.experiments.tasks.sudoku.layout import to_boards

    device = asked.prepare()
    if bool(asked.puzzle) == bool(asked.puzzles):
        raise InvalidArgument("give puzzles as arguments, or a file with --puzzles (one of both).")
    name = None if asked.checkpoint else _task_of(asked)
    model, task, loaded = open_checkpoint(asked.checkpoint, name, device, asked.backend)
    inputs = _inputs(asked, task)
    how = arguments_of_solve(asked.how, loaded.extra.get("solve"), task)
    answers = recurx.solve(model, {"inputs": torch.from_numpy(inputs).to(device)}, **how)
    predictions = answers.predictions.cpu().numpy()
    right = task.check(inputs, predictions)
    console = output.make_console()
    for row in range(min(asked.show, len(inputs))):
        verdict = "solved" if right[row] else "not solved: the answer breaks a rule or a given"
        steps = int(answers.steps[row])
        console.print(f"puzzle {row + 1}: {verdict}, {steps} step{'s' if steps > 1 else ''}")
        console.print(output.side_by_side([task.text(inputs[row]), task.text(predictions[row])]))
    console.print(f"{int(right.sum())} of {len(inputs)} solved")
    if asked.json:
        lines = ["".join(map(str, board)) for board in to_boards(predictions).tolist()]
        output.json_line(
            {"solved": right.tolist(), "answers": lines, "steps": answers.steps.tolist()}
        )
    return 0 if right.all() else UNSOLVED


def _task_of(asked: Options) -> str:
    """The Sudoku that the first puzzle has the length of; 9x9 if of none, which is then told."""
    from recurx.experiments.answering.checkpoints import SUDOKU_OF_LENGTH
    from recurx.experiments.tasks.sudoku import files

    first = files.first_puzzle(asked.puzzles) if asked.puzzles else asked.puzzle[0].strip()
    return SUDOKU_OF_LENGTH.get(len(first), "sudoku")


def _inputs(asked: Options, task: Task) -> NDArray[np.int64]:
    """Token ids [N, T] of the puzzles given as arguments or in a file."""
    from recurx.experiments.tasks import Sudoku
    from recurx.experiments.tasks.sudoku import files
    from recurx.experiments.tasks.sudoku.layout import to_tokens

    if not isinstance(task, Sudoku):
        raise InvalidArgument(f"this checkpoint is for {task.name}: use eval for other tasks.")
    if asked.puzzles:
        return to_tokens(files.read(asked.puzzles, task.layout).puzzles)
    return to_tokens(files.parse_boards(asked.puzzle, task.layout))
