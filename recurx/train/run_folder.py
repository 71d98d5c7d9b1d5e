"""The folder of a run: its state, its averaged model, and its metrics."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recurx import atomic
from recurx.checkpoint import load_checkpoint, save_checkpoint
from recurx.errors import CheckpointError, InvalidArgument, RecurxError, RunFailed
from recurx.models import RecursiveModel
from recurx.train import state
from recurx.train.config import TrainConfig

MODEL_FILE, STATE_FILE, METRICS_FILE = "model.safetensors", "state.safetensors", "metrics.jsonl"
LOCK_FILE = "run.lock"  # there while a process writes to the folder


class RunFolder:
    """The files of one run; nothing is written without a path.

    Args:
        path: the folder, made at the first write; None for a run in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known = self._state_there()  # what this run may replace
        self._holds = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Around all writing: no other run writes here meanwhile. Blocks of one object nest.

        Raises:
            RunFailed: another run has the folder, or saved here since this one last did.
            SaveFailed: the folder cannot be written to.
        """
        if self.path is None or self._holds:
            yield
            return
        with atomic.locked(self.path / LOCK_FILE):
            self._refuse_strange_state()
            self._holds = True
            try:
                yield
            finally:
                self._holds = False

    def _state_there(self) -> tuple[int, ...] | None:
        """What tells the present state file from any other, None without one."""
        if self.path is None or not (self.path / STATE_FILE).exists():
            return None
        about = (self.path / STATE_FILE).stat()
        return about.st_ino, about.st_size, about.st_mtime_ns

    def _refuse_strange_state(self) -> None:
        if self._state_there() != self.known:
            raise RunFailed(
                f"{self.path}: another run has saved here, and this one would overwrite it. Go on "
                f"with that one (--resume {self.path}), or choose another folder."
            )

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
        self.known = self._state_there()
        with self.explaining():
            return state.read(path)

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Around what reads the state: it becomes a CheckpointError that says what is left.

        A whole state that does not fit is one of another version of recurx.
        """
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, RecurxError) and not isinstance(error, CheckpointError):
                raise
            why, model = str(error), Path(self.path or "") / MODEL_FILE
            if not isinstance(error, CheckpointError):
                why = f"of another version of recurx ({type(error).__name__}: {error})."
                why = f"{self.path}/{STATE_FILE}: {why}"
            with contextlib.suppress(Exception):  # if the averaged weights load, they are offered
                step = load_checkpoint(model).extra.get("step")
                why += f" {model} beside it loads (step {step}): a new run can --start-from it."
            raise CheckpointError(why) from error

    def write(
        self,
        values: dict[str, Any],
        tensors: dict[str, Any],
        model: RecursiveModel,
        extra: dict[str, Any],
    ) -> None:
        """Write the state, then the model with `extra`; each appears whole or not at all."""
        if self.path is None:
            return
        with self.held():
            self._refuse_strange_state()
            state.write(self.path / STATE_FILE, values, tensors)
            self.known = self._state_there()
            save_checkpoint(self.path / MODEL_FILE, model, extra)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to the metrics; it needs a "step"."""
        if self.path is None:
            return
        path = self.path / METRICS_FILE
        with self.held(), atomic.explained(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def tidy(self, step: int) -> None:
        """Remove what a killed run left: parts of files, and metrics later than its state.

        The run that goes on makes those lines again. One that the kill cut short counts as later.
        """
        if self.path is None:
            return
        with self.held():
            metrics = self.path / METRICS_FILE
            if metrics.is_file():
                text = metrics.read_text(encoding="utf-8", errors="replace")
                kept = "".join(f"{line}\n" for line in text.splitlines() if _step_of(line) <= step)
                if kept != text:
                    with atomic.replacing(metrics) as new:  # a kill in here must not lose it
                        new.write_text(kept, encoding="utf-8")
            for name in (METRICS_FILE, STATE_FILE, MODEL_FILE):
                atomic.sweep(self.path / name)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")


def saved_config(folder: str | Path) -> TrainConfig:
    """The config of the run whose files lie in `folder`; raises as `RunFolder.read` does."""
    files = RunFolder(Path(folder))
    values, _ = files.read()
    with files.explaining():
        return TrainConfig.from_json(values["config"])
