"""`python -m recurx eval [TASK]`: accuracy by the rules, step by step, and what budgets buy."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recurx.cli import arc, options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import Console

    from recurx.tasks import Examples, Task

FEWEST_CLUES = 17  # of a 9x9 puzzle with one solution (arXiv 1201.0749): fewer need no search
LONG_SEARCH = 5000  # puzzles whose answers take so long to find that the wait is announced


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", nargs="?", help="default: the task that the checkpoint tells")
    options.add_checkpoint(parser)
    parser.add_argument("--puzzles", metavar="FILE", help="Sudokus: lines of digits (0 or . is a "
                        "blank), or a CSV with the columns of Sudoku-Extreme or Maze-Hard",
                        )  # fmt: skip
    parser.add_argument("--count", type=options.positive, metavar="N", help="at most N puzzles "
                        "(default: 512 generated held-out ones, or the whole file)")  # fmt: skip
    parser.add_argument("--batch-size", type=options.positive, default=256)
    parser.add_argument("--curve", metavar="FILE", help="draw exact accuracy against supervision "
                        "steps and wall time, with lines for 1, 2, 4 ... --rollouts (.png, .svg)",
                        )  # fmt: skip
    parser.add_argument("--compare-exit", action="store_true",
                        help="time halting rules against always --max-steps steps")  # fmt: skip
    parser.add_argument("--budget-count", type=options.positive, default=1024, metavar="N",
                        help="puzzles of --curve and --compare-exit at most (default 1024)",
                        )  # fmt: skip
    arc.add_arguments(parser)
    options.add_refinement(parser)
    options.add_machine(parser)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


@dataclass(frozen=True)
class Given:
    """The puzzles to evaluate: `known` says of which the answer is known (None: of all), and
    `seconds` how long finding answers took."""

    examples: Examples
    known: NDArray[np.bool_] | None = None
    source: str = ""
    seconds: float = 0.0


def run(arguments: argparse.Namespace) -> int:
    from recurx.cli import draw_budgets, output
    from recurx.cli.checkpoints import open_checkpoint
    from recurx.train import evaluate

    device = options.prepare_machine(arguments)
    picture = draw_budgets.check_path(arguments.curve) if arguments.curve else None
    model, task, loaded = open_checkpoint(
        arguments.checkpoint, arguments.task, device, arguments.backend
    )
    how = options.refinement(arguments, loaded.extra.get("solve"), task)
    console = output.make_console()
    if arguments.checkpoint is None:
        console.print(f"the net that ships for {task.name}: {loaded.path}", soft_wrap=True)
    for name, why in loaded.assumed.items():
        console.print(f"assumed {name}={getattr(loaded.config, name)!r}: {why}", markup=False)
    if loaded.extra.get("solve"):
        console.print(f"the net recommends {loaded.extra['solve']}", markup=False, soft_wrap=True)
    if arc.applies(arguments, task):
        return arc.evaluate(arguments, model, task, str(loaded.path), how, console, device)
    given = _given(console, arguments, task)
    console.print(f"{len(given.examples)} puzzles {given.source}")
    with output.counting(console, "solving", len(given.examples)) as show:
        report = evaluate(
            model, task, given.examples, known=given.known, batch_size=arguments.batch_size,
            device=device, on_batch=show, **how,
        )  # fmt: skip
    _print_report(console, report, how)
    result = {"task": task.name, "checkpoint": str(loaded.path)} | report.to_dict()
    result["answers_seconds"] = given.seconds
    few = given.examples.take(slice(arguments.budget_count))
    where = {"batch_size": arguments.batch_size, "device": device}
    title = f"{task.name}, {len(few)} puzzles, {Path(loaded.path).stem}"
    if arguments.compare_exit:
        result["exits"] = _compare_exits(console, model, task, few, how["max_steps"], where)
    if picture is not None:
        points = _budgets(console, model, task, few, how, where)
        trained = loaded.config.halt_max_steps
        draw_budgets.write(picture, title, lambda f: draw_budgets.draw_budgets(points, f, trained))
        console.print(f"curve: {picture}", soft_wrap=True)
        result["points"] = [asdict(point) for point in points]
    if arguments.json:
        output.json_line(result)
    return 0


def _print_report(console: Console, report: Any, how: dict[str, Any]) -> None:
    from recurx.cli import output

    cells = "unknown" if report.cells is None else f"{report.cells:.2%}"
    console.print(f"exact  {report.exact:.2%} (by the rules and the givens)")
    console.print(f"cells  {cells}")
    each = "a rollout" if how["rollouts"] > 1 else "each"
    console.print(f"steps  {report.steps_mean:.2f} a puzzle, at most {how['max_steps']} {each}")
    console.print(f"time   {report.seconds:.2f} s")
    console.print("exact accuracy if refinement stopped after")
    console.print(output.curve(report.curve), markup=False)
    taken = ", ".join(f"{steps}: {count}" for steps, count in report.histogram.items())
    console.print(f"steps taken  {taken}", soft_wrap=True)


def _budgets(
    console: Console, model: Any, task: Task, examples: Examples, how: dict[str, Any],
    where: dict[str, Any],
) -> list[Any]:  # fmt: skip
    """Points of the curve, measured and shown."""
    from recurx.cli import output
    from recurx.solving.budgets import budget_curve, doubling

    fixed = {key: value for key, value in how.items() if key not in ("max_steps", "rollouts")}
    rollouts = doubling(how["rollouts"])
    points = budget_curve(
        model, task, examples, doubling(how["max_steps"]), rollouts, **where, **fixed
    )
    rows = [
        [f"{p.max_steps}", f"{p.rollouts}", f"{p.exact:.1%}", f"{p.steps_mean:.1f}",
         f"{1000 * p.seconds:.2f} ms"]
        for p in points
    ]  # fmt: skip
    columns = ["steps at most", "rollouts", "exact", "steps taken", "time a puzzle"]
    console.print(output.table(f"What a budget buys, {len(examples)} puzzles", columns, rows))
    return points


def _compare_exits(
    console: Console, model: Any, task: Task, examples: Examples, max_steps: int,
    where: dict[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """Halting rules against all steps, measured and shown."""
    from recurx.cli import output
    from recurx.solving.budgets import compare_exits

    rows = compare_exits(model, task, examples, max_steps=max_steps, **where)
    console.print(output.exits(rows, len(examples)))
    console.print(output.fastest_exit(rows), soft_wrap=True)
    return [asdict(row) for row in rows]


def _given(console: Console, arguments: argparse.Namespace, task: Task) -> Given:
    from recurx import tasks

    if arguments.puzzles is not None:
        return read_puzzles(arguments.puzzles, task, arguments.count, console)
    sampler = tasks.Sampler(task, arguments.seed, "held-out")
    examples = sampler.draw_distinct(arguments.count or 512)
    return Given(examples, None, f"held out: {task.held_out_rule}")


def read_puzzles(path: str, task: Task, limit: int | None, console: Console) -> Given:
    """Sudokus or mazes from a file, with the answers of the file or those of the solver.

    Raises:
        InvalidArgument: the task is neither, or the file is bad.
    """
    import numpy as np

    from recurx.errors import InvalidArgument
    from recurx.tasks import Examples, Maze, Sudoku
    from recurx.tasks.maze import files as maze_files
    from recurx.tasks.sudoku import files
    from recurx.tasks.sudoku.layout import to_tokens
    from recurx.tasks.sudoku.solver import solve

    start = time.perf_counter()
    source = f"from {path}"
    if isinstance(task, Maze):
        examples, told = maze_files.read(path, task, limit)
        return Given(examples, told, source, time.perf_counter() - start)
    if not isinstance(task, Sudoku):
        raise InvalidArgument(f"--puzzles: files hold Sudokus or mazes, the task is {task.name}.")
    read = files.read(path, task.layout, limit)
    if read.answers is not None:
        return Given(Examples(to_tokens(read.puzzles), to_tokens(read.answers)), None, source)
    if len(read) > LONG_SEARCH:
        console.print(f"searching the answers of {len(read)} puzzles, for `cells`")
    clues = (read.puzzles > 0).sum(axis=1)
    searched = np.flatnonzero((clues >= FEWEST_CLUES) | (task.size < 9))
    solved = solve(task.layout, read.puzzles[searched])
    answers, known = np.zeros_like(read.puzzles), np.zeros(len(read), dtype=bool)
    answers[searched], known[searched] = solved.boards, solved.count == 1
    if not known.all():
        source += f", {int((~known).sum())} of them without a unique solution"
    seconds = time.perf_counter() - start
    return Given(Examples(to_tokens(read.puzzles), to_tokens(answers)), known, source, seconds)
