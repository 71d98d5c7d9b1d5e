"""A task of `recurx.tasks` as the data of a run: here alone a config's `task` becomes one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from recurx import tasks
from recurx.errors import bad_argument
from recurx.models import RecursiveModel, starts
from recurx.models.stablemax import IGNORE
from recurx.tasks.base import PAD, Examples, OnProgress, Split, Stream, Task
from recurx.train.config import TrainConfig


class TaskData:
    """Generated examples of a task, or those of a file.

    Args:
        config: of the run; its seed and its starts of weights count here.
        task: whose examples they are.
        sampler: the training examples.
        split: the file that they come from, in two parts; None if they are generated.
    """

    def __init__(
        self, config: TrainConfig, task: Task, sampler: Stream, split: Split | None = None
    ) -> None:
        self.config, self.task, self.sampler, self.split = config, task, sampler, split
        self.vocab_size, self.seq_len = task.vocab_size, task.seq_len
        self.num_puzzle_identifiers = task.num_puzzle_identifiers
        self.state_dict, self.load_state_dict = sampler.state_dict, sampler.load_state_dict

    def draw(self, count: int) -> dict[str, Tensor]:
        examples = self.sampler.draw(count)
        labels = torch.from_numpy(examples.answers)
        return {
            "inputs": torch.from_numpy(examples.inputs),
            "labels": labels.masked_fill(labels == PAD, IGNORE),
            "puzzle_identifiers": torch.from_numpy(examples.identifiers),
        }

    def held_out(self, count: int) -> Examples:
        if self.split is not None:
            return self.split.examples(self.split.held_out[:count])
        return tasks.Sampler(self.task, self.config.seed, "held-out").draw_distinct(count)

    @property
    def held_out_rule(self) -> str:
        """One sentence saying what the held-out examples have that training never has."""
        return self.task.held_out_rule if self.split is None else self.split.rule

    def prepare_(self, model: RecursiveModel) -> None:
        """The starts that the config asks for.

        Raises:
            InvalidArgument: the task is no grid, or the model has nothing that could start so.
        """
        if not (self.config.grid_positions or self.config.grid_mixing):
            return
        grid = self.task.grid
        if grid is None:
            raise bad_argument("train", "task", "a task on a grid (sudoku, maze)", self.task.name)
        if self.config.grid_positions:
            starts.positions_of_units_(model, grid.units)
        if self.config.grid_mixing:
            starts.mixing_of_neighbours_(model, grid.neighbours)

    def pinned(self, config: TrainConfig) -> TrainConfig:
        if self.split is None:
            return config
        return dataclasses.replace(
            config, puzzles=self.split.path, puzzles_sha256=self.split.sha256
        )


def open_data(
    config: TrainConfig,
    *,
    puzzles: str | Path | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> TaskData:
    """The data that a config names.

    Args:
        puzzles: where the config's file of puzzles lies now, if it moved.
        on_progress: called with (done, of how many) while the puzzles of a file are solved.

    Raises:
        InvalidArgument: unknown task; or it refuses the file of puzzles (`Task.split_file`).
    """
    task, path = tasks.get(config.task), puzzles or config.puzzles
    if path is None:
        return TaskData(config, task, tasks.Sampler(task, config.seed))
    split = task.split_file(
        path, config.hold_out, sha256=config.puzzles_sha256, on_progress=on_progress
    )
    return TaskData(config, task, split.sampler(config.seed, config.reveal), split)
