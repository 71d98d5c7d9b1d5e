"""Accuracy for a budget: against supervision steps, against wall time, and against early exit.

points = budget_curve(model, task, examples, steps=(1, 2, 4, 8, 16, 32), rollouts=(1, 4), sigma=0.2)
rows = compare_exits(model, task, examples)          # halting rules against always 16 steps
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from recurx.measure import synchronize
from recurx.solving.solve import solve
from recurx.tasks.base import Examples, Task
from recurx.train.evaluate import batch_of

# Halting rules that `compare_exits` times, by what a table calls them. q is a logit of being right:
# 0 is even odds, 2 is 7 to 1, 4 is 55 to 1.
EXITS: dict[str, dict[str, Any]] = {
    "q > 0": {"halt": "q"},
    "q > 2": {"halt": "q", "halt_above": 2.0},
    "q > 4": {"halt": "q", "halt_above": 4.0},
    "same answer twice": {"halt": "fixed-point", "patience": 1},
    "same answer 3 times": {"halt": "fixed-point", "patience": 2},
    "q > 4 or 3 times": {"halt": "any", "halt_above": 4.0, "patience": 2},
}
WARM_UP = 32  # examples solved before anything is timed: first calls pack weights


@dataclass(frozen=True)
class Point:
    """What one budget buys.

    Args:
        rollouts, max_steps: the budget.
        exact: share of examples whose whole answer is right.
        steps_mean: supervision steps an example, rollouts added up.
        seconds: wall time an example.
    """

    rollouts: int
    max_steps: int
    exact: float
    steps_mean: float
    seconds: float


@dataclass(frozen=True)
class Exit:
    """What a halting rule buys against always taking every step.

    Args:
        name, halt: the rule, as a table calls it and as arguments of `recurx.solve`.
        exact, steps_mean: as in `Point`.
        seconds: median wall time of all examples.
        speedup: median over the rounds of (time of all steps) / (time of this rule).
    """

    name: str
    halt: dict[str, Any]
    exact: float
    steps_mean: float
    seconds: float
    speedup: float


def doubling(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `most`."""
    found = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return (*found, most)


def budget_curve(
    model: nn.Module,
    task: Task,
    examples: Examples,
    steps: Sequence[int],
    rollouts: Sequence[int] = (1,),
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    **solve_arguments: Any,
) -> list[Point]:
    """Solve `examples` once with every budget, and measure accuracy and time of each.

    Args:
        steps: values of max_steps; they may exceed the number the model was trained with.
        rollouts: numbers of rollouts.
        solve_arguments: halt, sigma, init, ... of `recurx.solve`.
    """
    run = _Solver(model, task, examples, batch_size, device)
    run.warm_up(max_steps=1, rollouts=max(rollouts), **solve_arguments)
    found = []
    for number in rollouts:
        for budget in steps:
            exact, mean, seconds = run(max_steps=budget, rollouts=number, **solve_arguments)
            found.append(Point(number, budget, exact, mean, seconds / len(examples)))
    return found


def compare_exits(
    model: nn.Module,
    task: Task,
    examples: Examples,
    *,
    max_steps: int = 16,
    exits: dict[str, dict[str, Any]] = EXITS,
    rounds: int = 5,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> list[Exit]:
    """Time halting rules against `max_steps` steps for everybody, in interleaved rounds.

    Returns:
        All the rules, the fixed one first; accuracies are those of the last round.
    """
    rules = {f"always {max_steps} steps": {"halt": None}, **exits}
    run = _Solver(model, task, examples, batch_size, device)
    run.warm_up(max_steps=2, halt=None)
    times: dict[str, list[float]] = {name: [] for name in rules}
    result: dict[str, tuple[float, float]] = {}
    for _ in range(rounds):
        for name, rule in rules.items():
            exact, mean, seconds = run(max_steps=max_steps, **rule)
            times[name].append(seconds)
            result[name] = (exact, mean)
    fixed = times[next(iter(rules))]
    return [
        Exit(
            name, rule, *result[name], statistics.median(times[name]),
            statistics.median(a / b for a, b in zip(fixed, times[name], strict=True)),
        )
        for name, rule in rules.items()
    ]  # fmt: skip


def fastest_at_equal_accuracy(rows: Sequence[Exit]) -> Exit:
    """The fastest rule that solves no fewer examples than the first, fixed one."""
    return max((row for row in rows if row.exact >= rows[0].exact), key=lambda row: row.speedup)


class _Solver:
    """Solves the examples in batches and checks them; the clock runs while it solves."""

    def __init__(
        self, model: nn.Module, task: Task, examples: Examples, batch_size: int,
        device: torch.device | str,
    ) -> None:  # fmt: skip
        self.model, self.task, self.examples = model, task, examples
        self.device = torch.device(device)
        self.batches = [
            batch_of(examples, first, batch_size, self.device)
            for first in range(0, len(examples), batch_size)
        ]
        self.firsts = range(0, len(examples), batch_size)

    def warm_up(self, **arguments: Any) -> None:
        solve(self.model, batch_of(self.examples, 0, WARM_UP, self.device), **arguments)

    def __call__(self, **arguments: Any) -> tuple[float, float, float]:
        """(share right, mean steps an example with rollouts added up, seconds)."""
        synchronize(self.device)
        start = time.perf_counter()
        found = [
            solve(self.model, batch, first_sample=first, **arguments)
            for first, batch in zip(self.firsts, self.batches, strict=True)
        ]
        synchronize(self.device)
        seconds = time.perf_counter() - start
        answers = np.concatenate([part.predictions.cpu().numpy() for part in found])
        steps = sum(int(part.rollout_steps.sum()) for part in found)
        exact = float(self.task.right(self.examples, answers).mean())
        return exact, steps / len(self.examples), seconds
