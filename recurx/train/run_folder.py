"""The folder of a run: its state, its averaged model, and its metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recurx import atomic
from recurx.checkpoint import save_checkpoint
from recurx.errors import CheckpointError, InvalidArgument
from recurx.models import RecursiveModel
from recurx.train import state
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
        """Append one line to the metrics; it needs a "step"."""
        if self.path is not None:
            self.path.mkdir(parents=True, exist_ok=True)
            with (self.path / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def tidy(self, step: int) -> None:
        """Remove what a killed run left: parts of files, and metrics later than its state.

        The run that goes on makes those lines again. One that the kill cut short counts as later.
        """
        if self.path is None:
            return
        metrics = self.path / METRICS_FILE
        if metrics.is_file():
            text = metrics.read_text(encoding="utf-8")
            kept = "".join(f"{line}\n" for line in text.splitlines() if _step_of(line) <= step)
            if kept != text:
                with atomic.replacing(metrics) as new:  # a kill in here must not lose what it held
                    new.write_text(kept, encoding="utf-8")
        for name in (METRICS_FILE, STATE_FILE, MODEL_FILE):
            atomic.sweep(self.path / name)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")


def saved_config(folder: str | Path) -> TrainConfig:
    """The config of the run whose files lie in `folder`; raises as `RunFolder.read` does."""
    return TrainConfig.from_json(RunFolder(Path(folder)).read()[0]["config"])
