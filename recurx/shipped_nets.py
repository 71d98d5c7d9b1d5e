"""Trained nets that come with recurx, by task.

net = recurx.shipped("sudoku")                      # a Checkpoint, as load_checkpoint gives it
answers = recurx.solve(net.build(), batch, **net.recommended)
"""

from __future__ import annotations

from pathlib import Path

from recurx.checkpoint import Checkpoint, load_checkpoint
from recurx.errors import InvalidArgument

PACKAGE = Path(__file__).parent
# Task -> file in the package. The small one is also what the benchmark times.
NETS = {"sudoku": "data/sudoku-9x9.safetensors", "sudoku-6x6": "bench/nets/sudoku-6x6.safetensors"}


def shipped(task: str = "sudoku") -> Checkpoint:
    """The trained net that comes with recurx for `task`.

    Args:
        task: a task of `recurx.tasks`; options after a colon do not choose another net.

    Returns:
        The checkpoint; `.build()` makes the model, and `.extra` holds what its training noted:
        "task", and possibly "solve", which `.recommended` gives as arguments of `recurx.solve`.

    Raises:
        InvalidArgument: no net ships for the task, or this installation lacks its file.
    """
    return load_checkpoint(shipped_path(task))


def shipped_path(task: str = "sudoku") -> Path:
    """The file of that net; the same errors."""
    base = task.partition(":")[0]
    train = f"Train one: python -m recurx train {base}, and name it with --checkpoint FILE."
    if base not in NETS:
        raise InvalidArgument(
            f"shipped: no net ships for {base}; nets ship for {', '.join(NETS)}. {train}"
        )
    path = PACKAGE / NETS[base]
    if not path.is_file():
        raise InvalidArgument(f"shipped: this installation has no net for {base} ({path}). {train}")
    return path


def available(task: str) -> bool:
    """Whether `shipped(task)` has a net."""
    base = task.partition(":")[0]
    return base in NETS and (PACKAGE / NETS[base]).is_file()
