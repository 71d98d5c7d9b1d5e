"""A start for token mixing that knows the grid: sums over the cells next to each cell."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from recurx import tasks
from recurx.errors import bad_argument
from recurx.models import RecursiveModel
from recurx.train.positions import units_of_cells

NOISE = 0.3  # share of the model's own random start that stays


@torch.no_grad()
def grid_mixing_(model: RecursiveModel, task: tasks.Task) -> None:
    """Let the token MLPs of a model start as sums over the neighbours of each cell.

    Inner unit i of `mlp_t` reads the neighbours of cell i, with weights of norm 1, in its gate and
    in its up half, and cell i reads that unit. Random weights mix every cell with every other, and
    a net has to learn which few of them matter, for each cell by itself. `NOISE` of the random
    start stays, and all weights are free to move. Tokens of a puzzle embedding keep theirs.

    Raises:
        InvalidArgument: the task is no grid, or the model has no token MLPs, or narrower ones than
            the grid has cells.
    """
    config = model.config
    if not config.mlp_t:
        raise bad_argument(
            "train", "grid_mixing", "a model with token MLPs", "attention",
            "Set mlp_t=true, or leave grid_mixing out.",
        )  # fmt: skip
    near = torch.from_numpy(neighbours_of_cells(task)).float()
    near /= near.norm(dim=1, keepdim=True)
    cells, first, inner = len(near), config.prefix_len, config.inner_width(config.tokens)
    if inner < cells:
        raise bad_argument(
            "train", "expansion", f"an inner width of the token MLP of {cells} or more", inner,
            "Every cell takes one inner unit.",
        )  # fmt: skip
    for net in model.inner.nets().values():
        for block in net.layers:
            gate_up, down = block.mlp_t.gate_up_proj.weight, block.mlp_t.down_proj.weight
            for half in gate_up.split(inner):
                half[:, first:].mul_(NOISE)
                half[:cells, first:].add_(near)
            down[first:].mul_(NOISE)
            down[first:, :cells].add_(torch.eye(cells))


def neighbours_of_cells(task: tasks.Task) -> NDArray[np.bool_]:
    """[T, T]: whether two cells touch (maze) or share a row, a column or a box (Sudoku).

    Raises:
        InvalidArgument: the task is no grid.
    """
    units = units_of_cells(task)
    ours, others = units[:, :, None], units[:, None, :]
    if isinstance(task, tasks.Maze):  # rows and columns apart
        return np.asarray(abs(ours - others).sum(axis=0) == 1)
    shared = (ours == others).any(axis=0)
    return shared & ~np.eye(task.seq_len, dtype=bool)
