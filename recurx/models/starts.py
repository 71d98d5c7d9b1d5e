"""A start for learned positions that knows the grid: row + column (+ box) vectors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from recurx import tasks
from recurx.errors import bad_argument
from recurx.models import RecursiveModel
from recurx.models.layers import truncated_normal_


@torch.no_grad()
def grid_positions_(model: RecursiveModel, task: tasks.Task) -> None:
    """Set `inner.embed_pos` of a model to sums of one vector a row, a column and a box.

    Independent random vectors tell attention nothing of which cells share a row; it has to learn
    all pairs of cells. With sums, q·k of two cells has a term for each unit that they share, so one
    projection finds a row, a column or a box for all cells at once. The vectors stay free to move.
    Their sum has the standard deviation that the model's own start has, 1 / sqrt(hidden_size);
    positions of puzzle-embedding tokens keep theirs. Draws from torch's default generator.

    Raises:
        InvalidArgument: the task is no grid, or the model has no learned positions.
    """
    config = model.config
    if config.pos_encodings != "learned":
        raise bad_argument(
            "train", "grid_positions", "a model with learned positions", config.pos_encodings,
            "Set pos_encodings=learned, or leave grid_positions out.",
        )  # fmt: skip
    groups = units_of_cells(task)
    width = config.hidden_size
    std = (len(groups) * width) ** -0.5
    vectors = truncated_normal_(torch.empty(int(groups.max()) + 1, width), std)
    positions = vectors[torch.from_numpy(groups)].sum(0)  # [T, D]
    model.inner.embed_pos.embedding_weight[config.prefix_len :].copy_(positions)


def units_of_cells(task: tasks.Task) -> NDArray[np.int64]:
    """[G, T]: of each cell its row, its column and, on a Sudoku, its box, numbered apart.

    Raises:
        InvalidArgument: the task is no grid.
    """
    if isinstance(task, tasks.Sudoku):
        return task.layout.units_of_cell
    if isinstance(task, tasks.Maze):
        row, column = np.divmod(np.arange(task.seq_len), task.size)
        return np.stack([row, task.size + column])
    raise bad_argument("train", "task", "a task on a grid (sudoku, maze)", task.name)
