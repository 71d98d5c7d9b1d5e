"""The folder of a run: its state, its averaged model, and its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recurx import atomic
from recurx.checkpoint import save_checkpoint
from recurx.errors import CheckpointError, InvalidArgument
from recurx.models import RecursiveModel
from recurx.train import metrics, state
from recurx.train.config import TrainConfig

MODEL_FILE, STATE_FILE, METRICS_FILE = "model.safetensors", "state.safetensors", "metrics.jsonl"
NEEDED = ("model", "average", "carry", "exploration")  # of a state


class RunFolder:
    """The files of one run; nothing is written without a path.

    Args:
        path: the folder, made at the first write; None for a run in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The values and the tensors of the state.

        Raises:
            InvalidArgument: there is no run here.
            CheckpointError: the state file is damaged, or of another version.
        """
        path = None if self.path is None else self.path / STATE_FILE
        if path is None or not path.is_file():
            raise InvalidArgument(
                f"train: nothing to resume in {self.path}: no {STATE_FILE} there."
            )
        values, tensors = state.read(path)
        missing = sorted(set(NEEDED) - tensors.keys())
        if missing:
            raise CheckpointError(
                f"{path}: no {', '.join(missing)} in it: written by another version of recurx. "
                f"{MODEL_FILE} beside it still loads."
            )
        return values, tensors

    def write(
        self,
        values: dict[str, Any],
        tensors: dict[str, Any],
        model: RecursiveModel,
        extra: dict[str, Any],
    ) -> None:
        """Write the state, then the model with `extra`; each appears whole or not at all."""
        if self.path is not None:
            self.path.mkdir(parents=True, exist_ok=True)
            state.write(self.path / STATE_FILE, values, tensors)
            save_checkpoint(self.path / MODEL_FILE, model, extra)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to the metrics."""
        if self.path is not None:
            metrics.append(self.path / METRICS_FILE, record)

    def tidy(self, step: int) -> None:
        """Remove what a killed run left: parts of files, and metrics later than its state."""
        if self.path is not None:
            metrics.forget_after(self.path / METRICS_FILE, step)
            for name in (METRICS_FILE, STATE_FILE, MODEL_FILE):
                atomic.sweep(self.path / name)


def saved_config(folder: str | Path) -> TrainConfig:
    """The config of the run whose files lie in `folder`; raises as `RunFolder.read` does."""
    return TrainConfig.from_json(RunFolder(Path(folder)).read()[0]["config"])
