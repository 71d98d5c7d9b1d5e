"""Two attempts a test input: predictions of all augmentations vote, after undoing them.

The published protocol (HRM, TRM): the most frequent whole grid comes first, the greater mean
probability of being right (sigmoid of q_halt) decides among equals. A task counts with the share of
its test inputs that one of the first K grids answers exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from recurx.experiments.tasks.arc import Ballot, Question
from recurx.experiments.tasks.arc.canvas import Grid


def ranked(ballots: Iterable[Ballot]) -> dict[Question, list[Grid]]:
    """The different grids for each question, best first."""
    found: dict[Question, dict[tuple[tuple[int, ...], bytes], list[float]]] = {}
    for ballot in ballots:
        key = (ballot.grid.shape, np.ascontiguousarray(ballot.grid, dtype=np.uint8).tobytes())
        probability = 1 / (1 + np.exp(-np.nan_to_num(np.clip(ballot.q, -500, 500), nan=-500)))
        found.setdefault(ballot.question, {}).setdefault(key, []).append(float(probability))
    return {
        question: [
            np.frombuffer(content, dtype=np.uint8).reshape(shape)
            # sorted keeps the order of arrival among complete equals
            for (shape, content), _ in sorted(grids.items(), key=_rank)
        ]
        for question, grids in found.items()
    }


def _rank(item: tuple[object, Sequence[float]]) -> tuple[float, float]:
    votes = item[1]
    return -len(votes), -sum(votes) / len(votes)


def pass_at(
    attempts: Mapping[Question, Sequence[Grid]], solutions: Mapping[Question, Grid], k: int
) -> float:
    """Mean over tasks of the share of their test inputs that one of the first `k` grids solves.

    A question without attempts counts as wrong.
    """
    by_task: dict[str, list[bool]] = {}
    for question, solution in solutions.items():
        tries = attempts.get(question, ())[:k]
        right = any(np.array_equal(grid, solution) for grid in tries)
        by_task.setdefault(question[0], []).append(right)
    return float(np.mean([np.mean(right) for right in by_task.values()]))


def submission(
    attempts: Mapping[Question, Sequence[Grid]], questions: Iterable[Question]
) -> dict[str, list[dict[str, list[list[int]]]]]:
    """The competition's form: per task and test input `attempt_1` and `attempt_2`, grids as lists.

    With one attempt the second repeats it; without any both are one black cell.
    """
    black = np.zeros((1, 1), dtype=np.uint8)
    form: dict[str, list[dict[str, list[list[int]]]]] = {}
    for question in sorted(questions):
        tries = [grid for grid in attempts.get(question, ()) if grid.size][:2] or [black]
        form.setdefault(question[0], []).append(
            {"attempt_1": tries[0].tolist(), "attempt_2": tries[-1].tolist()}
        )
    return form
