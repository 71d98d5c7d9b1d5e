"""`train --tensorboard`: what metrics.jsonl gets, as TensorBoard's event files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recurx.errors import InvalidArgument

if TYPE_CHECKING:
    from recurx.train import Trainer

FOLDER = "tensorboard"


class EventFiles:
    """Event files of one run, in `tensorboard/` of its folder.

    A resumed run goes on in a new file, which takes back what a killed one wrote after its last
    checkpoint.

    Raises:
        InvalidArgument: TensorBoard is not installed, or the run has no folder.
    """

    def __init__(self, trainer: Trainer) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InvalidArgument(
                f"--tensorboard: {error}. Install it by pip install 'recurx[tensorboard]'."
            ) from error
        if trainer.folder is None:
            raise InvalidArgument("--tensorboard: only for a run that has a folder.")
        self._writer = SummaryWriter(str(trainer.folder / FOLDER), purge_step=trainer.step + 1)

    def write(self, step: int, record: dict[str, Any]) -> None:
        """The numbers of one line of metrics."""
        for name in ("loss", "lr"):
            self._writer.add_scalar(f"train/{name}", record[name], step)
        for name in ("exact", "cells", "steps_mean"):
            value = record["held_out"][name]
            if value is not None:
                self._writer.add_scalar(f"held_out/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
