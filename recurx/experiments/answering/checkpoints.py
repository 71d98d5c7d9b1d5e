"""Opens the checkpoint that a command names, with the task that it was trained for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recurx import tasks
from recurx.checkpoint import Checkpoint, load_checkpoint
from recurx.errors import InvalidArgument
from recurx.models import RecursiveModel
from recurx.shipped_nets import shipped_path
from recurx.tasks import Task

SUDOKU_OF_LENGTH = {16: "sudoku-4x4", 36: "sudoku-6x6", 81: "sudoku"}


def open_checkpoint(
    path: str | Path | None, task: str | None, device: Any, backend: str, rows: int | None = None
) -> tuple[RecursiveModel, Task, Checkpoint]:
    """The model in evaluation mode on `device`, and its task: the one asked for, that of the
    file, or the Sudoku that fits its number of tokens. Without a path, the net that ships for the
    task (9x9 Sudoku if none is named). `rows` of the puzzle embedding are the task's, or told by a
    file of their names.

    Raises:
        InvalidArgument: no task can be told, model and task do not fit, or no net ships for it.
        CheckpointError, FileNotFoundError: of `load_checkpoint`.
    """
    if path is None:
        task = task or "sudoku"
        path = shipped_path(task)
    loaded = load_checkpoint(path)
    config = loaded.config
    name = task or loaded.extra.get("task") or SUDOKU_OF_LENGTH.get(config.seq_len)
    if name is None:
        raise InvalidArgument(
            f"{path}: does not say its task, and {config.seq_len} tokens are no Sudoku: name it."
        )
    chosen = tasks.get(name)
    if (config.seq_len, config.vocab_size) != (chosen.seq_len, chosen.vocab_size):
        raise InvalidArgument(
            f"{path}: this model reads {config.seq_len} tokens out of {config.vocab_size}, "
            f"task {name} has {chosen.seq_len} out of {chosen.vocab_size}."
        )
    rows = rows or chosen.num_puzzle_identifiers
    if rows > 1 and config.puzzle_emb_ndim and config.num_puzzle_identifiers != rows:
        raise InvalidArgument(
            f"{path}: this model knows {config.num_puzzle_identifiers:,} puzzles, task {name} has "
            f"{rows:,}: name the task with the options that it was trained with."
        )
    return loaded.build(backend=backend).to(device), chosen, loaded
