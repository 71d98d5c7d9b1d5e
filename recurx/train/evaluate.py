"""Accuracy by the rules of the task, over refinement steps, with the time it took."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recurx.errors import bad_argument
from recurx.measure import synchronize
from recurx.solving.solve import Answers, solve
from recurx.tasks.base import PAD, Examples
from recurx.train.data import Judge


@dataclass(frozen=True)
class Report:
    """What `evaluate` measured.

    Args:
        count: number of examples.
        exact: share whose whole answer is right by the task's checker.
        cells: share of tokens that equal the known answers (None where none are known).
        steps_mean: supervision steps a sample, rollouts added up.
        seconds: wall time of the refinement alone.
        curve: exact accuracy if every sample stopped after 1, 2, ... steps (or at its halt).
        histogram: {steps: how many rollouts took them}.
        known_cells: number of tokens that `cells` is a share of.
        verdicts: {verdict: how many samples}, of a search.
        wrong: answers that a search took and the checker refuses.
    """

    count: int
    exact: float
    cells: float | None
    steps_mean: float
    seconds: float
    curve: tuple[float, ...]
    histogram: dict[int, int]
    known_cells: int = 0
    verdicts: dict[str, int] = field(default_factory=dict)
    wrong: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: nn.Module, task: Judge, examples: Examples, *, known: NDArray[np.bool_] | None = None,
    batch_size: int = 256, first_sample: int = 0, device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] = lambda done: None, **solve_arguments: Any,
) -> Report:  # fmt: skip
    """Refine every example with `recurx.solve` and check the answers by the rules.

    Args:
        known: [N] which rows of `examples.answers` are known, for `cells`; None for all. The other
            rows count for everything else: the checker needs no solution.
        first_sample: number of the first example, where these are a part of more.
        on_batch: called with the number of examples that are done.
        solve_arguments: max_steps, halt, rollouts, search, ... of `recurx.solve`.

    Raises:
        InvalidArgument: no examples, or a bad argument of `recurx.solve`.
    """
    if not len(examples):
        raise bad_argument("train.evaluate", "examples", "one example or more", "none")
    on = torch.device(device)
    parts: list[Answers] = []
    start = time.perf_counter()
    for first in range(0, len(examples), batch_size):
        batch = batch_of(examples, first, batch_size, on)
        # A sample's noise follows from its number among all examples, so not from batch_size. NOTE:
        # the CUDA engine's own solve counts from 0 in each batch.
        if solve_arguments.get("backend") != "cuda":
            solve_arguments["first_sample"] = first_sample + first
        parts.append(solve(model, batch, trace=True, **solve_arguments))
        on_batch(min(first + batch_size, len(examples)))
    synchronize(on)
    seconds = time.perf_counter() - start
    answers = np.concatenate([part.predictions.cpu().numpy() for part in parts])
    known = np.ones(len(examples), dtype=bool) if known is None else known
    cells = (answers == examples.answers)[known[:, None] & (examples.answers != PAD)]
    steps: Counter[int] = Counter()
    for part in parts:
        steps.update(part.histogram())
    right = task.right(examples, answers)
    verdicts = [verdict for part in parts for verdict in part.verdicts or ()]
    return Report(
        count=len(examples),
        exact=float(right.mean()),
        cells=float(cells.mean()) if cells.size else None,
        steps_mean=float(sum(int(p.rollout_steps.sum()) for p in parts) / len(examples)),
        seconds=seconds,
        curve=_curve(task, examples, parts),
        histogram=dict(sorted(steps.items())),
        known_cells=cells.size,
        verdicts=dict(Counter(verdicts)),
        wrong=sum(v == "solved" and not r for v, r in zip(verdicts, right, strict=False)),
    )


def batch_of(
    examples: Examples, first: int, size: int, device: torch.device | str
) -> dict[str, Tensor]:
    """`size` examples from number `first` on, as `recurx.solve` takes them."""
    part = examples.take(slice(first, first + size))
    inputs, numbers = torch.from_numpy(part.inputs), torch.from_numpy(part.identifiers)
    return {"inputs": inputs.to(device), "puzzle_identifiers": numbers.to(device)}


def _curve(task: Judge, examples: Examples, parts: list[Answers]) -> tuple[float, ...]:
    """Exact accuracy after each step; a batch that ended early keeps its answers."""
    traces = [part.trace.cpu().numpy() for part in parts if part.trace is not None]
    longest = max(map(len, traces))
    return tuple(
        float(task.right(examples, np.concatenate([t[min(i, len(t) - 1)] for t in traces])).mean())
        for i in range(longest)
    )
