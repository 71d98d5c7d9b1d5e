"""`eval --grades`: each puzzle in one grade, and puzzles a second beside the classical solver's."""

from __future__ import annotations

import json

import pytest
import torch

from recurx import tasks
from recurx.commands import main
from recurx.errors import InvalidArgument
from recurx.experiments.answering import grades
from recurx.experiments.tasks.questions import Questions
from recurx.experiments.tasks.sudoku import solver
from recurx.experiments.tasks.sudoku.layout import to_boards


def test_throughput_stands_beside_the_solvers(untrained_6x6: str, capsys) -> None:
    words = ["eval", "sudoku-6x6", "--checkpoint", untrained_6x6, "--count", "96", "--grades"]
    assert main([*words, "--json", "--max-steps", "2", "--halt", "none"]) == 0
    printed, said = capsys.readouterr()
    rows = json.loads(printed)["grades"]
    task = tasks.get("sudoku-6x6")
    examples = tasks.Sampler(task, 0, "held-out").draw_distinct(96)
    guesses = solver.solve(task.layout, to_boards(examples.inputs)).guesses
    counts = {row["guesses"]: row["report"]["count"] for row in rows}
    assert sum(counts.values()) == 96 and counts["0"] == int((guesses == 0).sum())
    for row in rows:
        report = row["report"]
        assert row["rate"] == pytest.approx(report["count"] / report["seconds"])
        assert row["solver_rate"] > 0
    assert f"threads of the net: {torch.get_num_threads()}" in " ".join(said.split())


def test_only_sudokus_have_grades() -> None:
    task = tasks.get("sort")
    given = Questions(tasks.Sampler(task, 0, "held-out").draw(4), None, "drawn")
    with pytest.raises(InvalidArgument, match="for Sudokus, the task is sort"):
        grades.evaluate_by_grade(None, task, given)
