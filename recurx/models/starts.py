"""Starts of weights that know which tokens of a question belong together, as cells of a grid do."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from recurx.errors import bad_argument
from recurx.models.act import RecursiveModel
from recurx.models.layers import truncated_normal_

NOISE = 0.3  # share of its own random start that token mixing keeps


@torch.no_grad()
def positions_of_units_(model: RecursiveModel, units: NDArray[np.int64]) -> None:
    """Set `inner.embed_pos` of a model to sums of one vector a row, a column and a box.

    Independent random vectors tell attention nothing of which cells share a row; it has to learn
    all pairs of cells. With sums, q·k of two cells has a term for each unit that they share, so one
    projection finds a row, a column or a box for all cells at once. The vectors stay free to move.
    Their sum has the standard deviation that the model's own start has, 1 / sqrt(hidden_size);
    positions of puzzle-embedding tokens keep theirs. Draws from torch's default generator.

    Args:
        units: [G, T] of each cell its row, its column, ..., numbered apart.

    Raises:
        InvalidArgument: the model has no learned positions.
    """
    config = model.config
    if config.pos_encodings != "learned":
        raise bad_argument(
            "train", "grid_positions", "a model with learned positions", config.pos_encodings,
            "Set pos_encodings=learned, or leave grid_positions out.",
        )  # fmt: skip
    width = config.hidden_size
    std = (len(units) * width) ** -0.5
    vectors = truncated_normal_(torch.empty(int(units.max()) + 1, width), std)
    positions = vectors[torch.from_numpy(units)].sum(0)  # [T, D]
    model.inner.embed_pos.embedding_weight[config.prefix_len :].copy_(positions)


@torch.no_grad()
def mixing_of_neighbours_(model: RecursiveModel, neighbours: NDArray[np.bool_]) -> None:
    """Let the token MLPs of a model start as sums over the neighbours of each cell.

    Inner unit i of `mlp_t` reads the neighbours of cell i, with weights of norm 1, in its gate and
    in its up half, and cell i reads that unit. Random weights mix every cell with every other, and
    a net has to learn which few of them matter, for each cell by itself. `NOISE` of the random
    start stays, and all weights are free to move. Tokens of a puzzle embedding keep theirs.

    Args:
        neighbours: [T, T], true for pairs of cells.

    Raises:
        InvalidArgument: the model has no token MLPs, or narrower ones than there are cells.
    """
    config = model.config
    if not config.mlp_t:
        raise bad_argument(
            "train", "grid_mixing", "a model with token MLPs", "attention",
            "Set mlp_t=true, or leave grid_mixing out.",
        )  # fmt: skip
    near = torch.from_numpy(neighbours).float()
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
            down[first:, :cells].add_(torch.eye(cells, device=down.device))
