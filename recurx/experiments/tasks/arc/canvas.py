"""ARC grids as tokens: a 30x30 canvas, row after row, and back.

Tokens (the convention of the official data sets): 0 padding, 1 the end of a row and of a column,
2..11 the colours 0..9. The end tokens run along the bottom and the right side of the grid, where
the canvas goes on; their corner is padding.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recurx.tasks.base import PAD, Flags, Tokens

Grid = NDArray[np.uint8]  # [rows, columns] of colours 0..9

SIDE = 30
END = 1
FIRST_COLOUR = 2
COLOURS = 10
VOCAB_SIZE = FIRST_COLOUR + COLOURS


def encode(grid: Grid, top: int = 0, left: int = 0) -> NDArray[np.int64]:
    """[900] tokens of a grid whose corner lies at (top, left)."""
    canvas = np.full((SIDE, SIDE), PAD, dtype=np.int64)
    bottom, right = top + grid.shape[0], left + grid.shape[1]
    canvas[top:bottom, left:right] = grid + FIRST_COLOUR
    canvas[bottom : bottom + 1, left:right] = END
    canvas[top:bottom, right : right + 1] = END
    return canvas.reshape(-1)


def sizes(tokens: Tokens) -> NDArray[np.int64]:
    """[N, 2] rows and columns of the largest rectangle of colours at the corner of each canvas
    [N, 900], the least rows among equals; 0, 0 where the corner has no colour."""
    coloured = (tokens >= FIRST_COLOUR).reshape(-1, SIDE, SIDE)
    run = np.logical_and.accumulate(coloured, axis=2).sum(axis=2)  # colours from the left, by row
    columns = np.minimum.accumulate(run, axis=1)
    best = (columns * np.arange(1, SIDE + 1)).argmax(axis=1)
    columns = columns[np.arange(len(tokens)), best]
    return np.stack([np.where(columns > 0, best + 1, 0), columns], axis=1)


def decode(tokens: Tokens) -> list[Grid]:
    """The grid at the corner of each canvas [N, 900], as official evaluation cuts it."""
    canvases = tokens.reshape(-1, SIDE, SIDE)
    return [
        (canvas[:rows, :columns] - FIRST_COLOUR).astype(np.uint8)
        for canvas, (rows, columns) in zip(canvases, sizes(tokens).tolist(), strict=True)
    ]


def well_formed(tokens: Tokens) -> Flags:
    """Which canvases [N, 900] hold a whole grid at their corner: colours, and ends all along its
    bottom and right side. What lies beyond is not looked at; nor do losses."""
    canvases = tokens.reshape(-1, SIDE, SIDE)
    flags = np.zeros(len(tokens), dtype=bool)
    for i, (rows, columns) in enumerate(sizes(tokens).tolist()):
        below, beside = canvases[i, rows : rows + 1, :columns], canvases[i, :rows, columns:]
        flags[i] = rows > 0 and bool((below == END).all() and (beside[:, :1] == END).all())
    return flags


def anywhere(tokens: NDArray[np.int64]) -> Grid:
    """The grid on one whole canvas [900], wherever it lies."""
    canvas = tokens.reshape(SIDE, SIDE)
    rows, columns = np.nonzero(canvas >= FIRST_COLOUR)
    if not len(rows):
        return np.zeros((0, 0), dtype=np.uint8)
    cut = canvas[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return (cut - FIRST_COLOUR).astype(np.uint8)
