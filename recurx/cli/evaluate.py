"""`python -m recurx eval [TASK] --checkpoint FILE`: accuracy by the rules, step by step."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from recurx.cli import options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from recurx.tasks import Examples, Task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", nargs="?", help="default: the task that the checkpoint tells")
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    parser.add_argument("--puzzles", metavar="FILE", help="Sudokus: lines of digits (0 or . is a "
                        "blank), or a CSV with the columns of Sudoku-Extreme or Maze-Hard",
                        )  # fmt: skip
    parser.add_argument("--count", type=options.positive, metavar="N", help="at most N puzzles "
                        "(default: 512 generated held-out ones, or the whole file)")  # fmt: skip
    parser.add_argument("--batch-size", type=options.positive, default=256)
    options.add_refinement(parser)
    options.add_machine(parser)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(arguments: argparse.Namespace) -> int:
    from recurx.cli import output
    from recurx.cli.checkpoints import open_checkpoint
    from recurx.train import evaluate

    device = options.prepare_machine(arguments)
    model, task, loaded = open_checkpoint(
        arguments.checkpoint, arguments.task, device, arguments.backend
    )
    console = output.make_console()
    for name, why in loaded.assumed.items():
        console.print(f"assumed {name}={getattr(loaded.config, name)!r}: {why}", markup=False)
    examples, known, source = _examples(arguments, task)
    console.print(f"{len(examples)} puzzles {source}")
    report = evaluate(
        model, task, examples, known=known, batch_size=arguments.batch_size, device=device,
        **options.refinement(arguments),
    )  # fmt: skip
    cells = "unknown" if report.cells is None else f"{report.cells:.2%}"
    console.print(f"exact  {report.exact:.2%} (by the rules and the givens)")
    console.print(f"cells  {cells}")
    each = "a rollout" if arguments.rollouts > 1 else "each"
    console.print(f"steps  {report.steps_mean:.2f} a puzzle, at most {arguments.max_steps} {each}")
    console.print(f"time   {report.seconds:.2f} s")
    console.print("exact accuracy if refinement stopped after")
    console.print(output.curve(report.curve), markup=False)
    taken = ", ".join(f"{steps}: {count}" for steps, count in report.histogram.items())
    console.print(f"steps taken  {taken}", soft_wrap=True)
    if arguments.json:
        output.json_line({"task": task.name, "checkpoint": arguments.checkpoint} | report.to_dict())
    return 0


def _examples(
    arguments: argparse.Namespace, task: Task
) -> tuple[Examples, NDArray[np.bool_] | None, str]:
    """The examples, which of their answers are known, and where they come from."""
    from recurx import tasks

    if arguments.puzzles is None:
        sampler = tasks.Sampler(task, arguments.seed, "held-out")
        return (
            sampler.draw_distinct(arguments.count or 512),
            None,
            f"held out: {task.held_out_rule}",
        )
    examples, known = read_puzzles(arguments.puzzles, task, arguments.count)
    return examples, known, f"from {arguments.puzzles}"


def read_puzzles(path: str, task: Task, limit: int | None) -> tuple[Examples, Any]:
    """Sudokus or mazes from a file, with the answers of the file or those of the solver, and which
    of them are the only right ones (None: all).

    Raises:
        InvalidArgument: the task is neither, or the file is bad.
    """
    from recurx.errors import InvalidArgument
    from recurx.tasks import Examples, Maze, Sudoku
    from recurx.tasks.maze import files as maze_files
    from recurx.tasks.sudoku import files
    from recurx.tasks.sudoku.layout import to_tokens
    from recurx.tasks.sudoku.solver import solve

    if isinstance(task, Maze):
        return maze_files.read(path, task, limit)
    if not isinstance(task, Sudoku):
        raise InvalidArgument(f"--puzzles: files hold Sudokus or mazes, the task is {task.name}.")
    read = files.read(path, task.layout, limit)
    if read.answers is not None:
        return Examples(to_tokens(read.puzzles), to_tokens(read.answers)), None
    solved = solve(task.layout, read.puzzles)
    return Examples(to_tokens(read.puzzles), to_tokens(solved.boards)), solved.count == 1
