"""`python -m recurx eval arc`: all augmentations of a test input vote for two attempts."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recurx.cli import options
from recurx.errors import InvalidArgument
from recurx.options import file, option

if TYPE_CHECKING:
    from rich.console import Console

    from recurx.experiments.tasks.arc import Arc
    from recurx.models import RecursiveModel
    from recurx.tasks import Task


@dataclass(frozen=True)
class Options:
    votes: int | None = option(
        None, "ARC: augmentations that vote on each test input (default: all)", least=1
    )
    identifiers: str | None = file("ARC: names of the rows of the puzzle embedding, default: "
                                   "identifiers.json beside puzzles or net")  # fmt: skip
    submission: str | None = file("ARC: write the two attempts at every test input, in the form of "
                                  "the competition")  # fmt: skip


def applies(asked: Any, task: Task) -> bool:
    """Whether `task` is evaluated here.

    Raises:
        InvalidArgument: an option was given that `task` does not know.
    """
    from recurx.experiments.tasks import Arc

    votes = isinstance(task, Arc)
    others = ("curve", "compare_exit") if votes else ("votes", "submission", "identifiers")
    for name in others:
        if getattr(asked, name):
            option = options.flags([name])
            raise InvalidArgument(f"{option}: not for the task {task.name}, leave it out.")
    return votes


def names_of_rows(asked: Any) -> Path | None:
    """The file that names the rows of the net's puzzle embedding, if there is one."""
    from recurx.experiments.tasks.arc.files import IDENTIFIERS

    if asked.identifiers:
        return Path(asked.identifiers)
    if not asked.puzzles or not asked.checkpoint:
        return None
    given = Path(asked.puzzles)
    folders = [given if given.is_dir() else given.parent, Path(asked.checkpoint).parent]
    return next((at / IDENTIFIERS for at in folders if (at / IDENTIFIERS).is_file()), None)


def evaluate(
    asked: Any,
    model: RecursiveModel,
    task: Arc,
    checkpoint: str,
    how: dict[str, Any],
    console: Console,
    device: Any,
) -> int:
    """Print pass@1 and pass@2 over the evaluation tasks (the first `--count` of them), found by
    `recurx.solve` with the arguments `how`."""
    import numpy as np
    import torch

    import recurx
    from recurx.cli import output
    from recurx.experiments.tasks.arc import Ballot, vote
    from recurx.tasks.base import PAD

    ballots: list[Ballot] = []
    right, formed, steps = [], [], []
    seconds = 0.0
    for examples, marks in task.test_batches(asked.batch_size, asked.votes, asked.count):
        batch = {
            "inputs": torch.from_numpy(examples.inputs).to(device),
            "puzzle_identifiers": torch.from_numpy(examples.identifiers).to(device),
        }
        start = time.perf_counter()
        found = recurx.solve(model, batch, **how)
        answers, q = found.predictions.cpu().numpy(), found.q.cpu().numpy()
        seconds += time.perf_counter() - start
        ballots += task.ballots(marks, answers, q)
        known = (examples.answers != PAD).any(axis=1)
        right.append(task.right(examples, answers)[known])
        formed.append(task.well_formed(answers))
        steps.append(found.rollout_steps.sum(dim=1).cpu().numpy())
    attempts = vote.ranked(ballots)
    solutions = {key: grid for key, grid in task.solutions.items() if key in attempts}
    judged = np.concatenate(right)
    well_formed, taken = (float(np.concatenate(x).mean()) for x in (formed, steps))
    exact = float(judged.mean()) if len(judged) else None
    first, second = (vote.pass_at(attempts, solutions, k) if solutions else None for k in (1, 2))
    report = {
        "tasks": len({task_id for task_id, _ in attempts}), "questions": len(attempts),
        "labelled": len(solutions), "predictions": len(ballots), "pass@1": first,
        "pass@2": second, "exact": exact,
        "well_formed": well_formed, "steps_mean": taken, "seconds": seconds,
    }  # fmt: skip
    labelled = "" if len(solutions) == len(attempts) else f", {len(solutions)} with a label"
    shown = ["unknown" if x is None else f"{x:.2%}" for x in (first, second, exact)]
    console.print(
        f"{report['questions']} test inputs of {report['tasks']} evaluation tasks{labelled}, "
        f"{report['predictions']} predictions (augmentations)\n"
        f"pass@1       {shown[0]} of tasks, by vote, against the labels\n"
        f"pass@2       {shown[1]}\n"
        f"exact        {shown[2]} of single predictions, before the vote\n"
        f"well-formed  {well_formed:.2%} are a whole grid (needs no labels)\n"
        f"steps        {taken:.2f} a prediction\n"
        f"time         {seconds:.2f} s"
    )
    if asked.submission is not None:
        form = vote.submission(attempts, attempts)
        Path(asked.submission).write_text(json.dumps(form), encoding="utf-8")
        console.print(f"attempts: {asked.submission}", soft_wrap=True)
    if asked.json:
        output.json_line({"task": task.name, "checkpoint": checkpoint} | report)
    return 0
