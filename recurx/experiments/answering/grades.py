"""`eval sudoku --grades`: accuracy and throughput by hardness, beside a classical solver.

The grade of a puzzle is the number of guesses of a solver that knows naked and hidden singles, and
guesses in the cell with the fewest candidates, until it has proved its solution to be the only one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from recurx.errors import InvalidArgument
from recurx.experiments.answering import reports
from recurx.experiments.tasks.questions import Questions
from recurx.experiments.tasks.sudoku import Sudoku, solver
from recurx.experiments.tasks.sudoku.layout import to_boards
from recurx.measure import processor
from recurx.train import Report, evaluate

if TYPE_CHECKING:
    from rich.table import Table

    from recurx.tasks import Task

GRADES = ((0, 0), (1, 2), (3, 9), (10, 29), (30, None))  # guesses from .. to


@dataclass(frozen=True)
class Graded:
    """Of the puzzles of one grade: what `evaluate` found, and the CPU time of all threads that it
    took (beside its judging), and that of the classical solver, which solves all.

    Args:
        rate, solver_rate: puzzles a second of wall time: of the net, from `report.seconds` (right
            and wrong answers), and of the solver, which has one thread and solves all at once.
    """

    guesses: str
    report: Report
    cpu_seconds: float
    solver_cpu_seconds: float
    rate: float
    solver_rate: float


def evaluate_by_grade(model: Any, task: Task, given: Questions, **how: Any) -> list[Graded]:
    """`train.evaluate` of the puzzles of each grade that has any.

    Raises:
        InvalidArgument: the task is no Sudoku.
    """
    if not isinstance(task, Sudoku):
        raise InvalidArgument(f"--grades: for Sudokus, the task is {task.name}. Leave it out.")
    boards = to_boards(given.examples.inputs)
    guesses = solver.solve(task.layout, boards).guesses
    found: list[Graded] = []
    for least, most in GRADES:
        rows = np.flatnonzero((guesses >= least) & (guesses <= (10**9 if most is None else most)))
        if not len(rows):
            continue
        start, clock = time.process_time(), time.perf_counter()
        solver.solve(task.layout, boards[rows])
        middle, wall = time.process_time(), time.perf_counter() - clock
        known = None if given.known is None else given.known[rows]
        report = evaluate(model, task, given.examples.take(rows), known=known, **how)
        name = f"{least} or more" if most is None else f"{least}" + f" to {most}" * (most > least)
        spent = time.process_time() - middle
        rates = len(rows) / report.seconds, len(rows) / wall
        found.append(Graded(name, report, spent, middle - start, *rates))
    return found


def shown(found: list[Graded]) -> Table:
    """The table that `eval` prints, with a row of all puzzles."""
    import torch

    from recurx.cli import output

    report = reports.merged([graded.report for graded in found])
    every = Graded(
        "all", report, sum(graded.cpu_seconds for graded in found),
        sum(graded.solver_cpu_seconds for graded in found), report.count / report.seconds,
        report.count / sum(graded.report.count / graded.solver_rate for graded in found),
    )  # fmt: skip
    rows = [
        [
            graded.guesses, f"{graded.report.count}", f"{graded.report.exact:.2%}",
            f"{graded.report.steps_mean:.1f}",
            f"{1000 * graded.cpu_seconds / graded.report.count:.1f} ms",
            f"{1000 * graded.solver_cpu_seconds / graded.report.count:.2f} ms",
            f"{graded.rate:,.1f}", f"{graded.solver_rate:,.0f}",
        ]
        for graded in [*found, every]
    ]  # fmt: skip
    columns = ["guesses", "puzzles", "exact", "steps each", "CPU time each", "classical solver's",
               "puzzles a second", "classical solver's"]  # fmt: skip
    machine = f"{processor()[0]}, threads of the net: {torch.get_num_threads()}"
    title = f"By hardness (guesses of the classical solver, which solves all)\n{machine}"
    return output.table(title, columns, rows)
