"""Shows a training run: a live bar on a terminal, a line per evaluation elsewhere; event files."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console

from recurx.cli import output
from recurx.errors import InvalidArgument

if TYPE_CHECKING:
    from recurx.train import Progress as StepProgress
    from recurx.train import Report, Trainer

FOLDER = "tensorboard"  # of event files, in that of the run
BETWEEN_TEXTS = 0.1  # seconds: on a GPU, reading the loss waits for the step


class TrainingDisplay:
    """Evaluates on held-out examples every `eval_every` steps; asks the run to end at `until`.

    `with display.bar: trainer.run(..., on_step=display.on_step)` shows a run. The bar shows the
    held-out accuracy, since nothing else tells how far a run is. Refinement takes all 16 steps
    unless `solve_arguments` say otherwise. `on_record` gets the step and what metrics.jsonl gets,
    after each evaluation.
    """

    def __init__(
        self,
        console: Console,
        trainer: Trainer,
        eval_every: int,
        eval_count: int,
        until: float | None = None,
        on_record: Callable[[int, dict[str, Any]], None] = lambda step, record: None,
        **solve_arguments: Any,
    ) -> None:
        self.console, self.trainer = console, trainer
        self.eval_every, self.until, self.on_record = eval_every, until, on_record
        self.examples = trainer.held_out(eval_count)
        self.solve_arguments = {"halt": None, **solve_arguments}
        self.report: Report | None = None
        self._evaluated_at = -1
        self._next_text = 0.0
        self.bar = output.progress_bar(
            console, "training", "held-out exact {task.percentage:5.1f} %  {task.fields[text]}"
        )
        self._row = self.bar.add_task("", total=1.0, text="")

    def on_step(self, progress: StepProgress) -> bool:
        """Called after every training step; True ends the run."""
        if time.monotonic() >= self._next_text:
            self.bar.update(self._row, text=f"step {progress.step}  loss {progress.loss:.3f}")
            self._next_text = time.monotonic() + BETWEEN_TEXTS
        if progress.step % self.eval_every:
            return False
        report = self.evaluate()
        record = {"seconds": progress.seconds, "loss": progress.loss, "lr": self.trainer.lr}
        record |= {"held_out": report.to_dict()}
        self.trainer.log(record)
        self.on_record(progress.step, record)
        self.bar.update(self._row, completed=report.exact)
        if not self.console.is_terminal:
            self.console.print(
                f"  step {progress.step:6d}  {progress.seconds:6.1f} s  loss {progress.loss:.3f}  "
                f"held-out exact {report.exact:6.1%}"
            )
        return self.until is not None and report.exact >= self.until

    def evaluate(self) -> Report:
        """The averaged weights on the held-out examples, once a training step at most."""
        if self.report is None or self._evaluated_at != self.trainer.step:
            from recurx.train import evaluate

            trainer = self.trainer
            self.bar.update(self._row, text=f"step {trainer.step}  evaluating")
            self.report = evaluate(
                trainer.averaged(), trainer.task, self.examples, device=trainer.device,
                **self.solve_arguments,
            )  # fmt: skip
            self._evaluated_at = trainer.step
        return self.report


@contextlib.contextmanager
def event_files(trainer: Trainer) -> Iterator[Callable[[int, dict[str, Any]], None]]:
    """Event files of one run, in `tensorboard/` of its folder; writes a step's line of metrics.

    A resumed run goes on in a new file, which takes back what a killed one wrote after its last
    checkpoint.

    Raises:
        InvalidArgument: TensorBoard is not installed, or the run has no folder.
    """

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InvalidArgument(
            f"--tensorboard: {error}. Install it by pip install 'recurx[tensorboard]'."
        ) from error
    if trainer.folder is None:
        raise InvalidArgument("--tensorboard: only for a run that has a folder.")
    writer = SummaryWriter(str(trainer.folder / FOLDER), purge_step=trainer.step + 1)

    def write(step: int, record: dict[str, Any]) -> None:
        for name in ("loss", "lr"):
            writer.add_scalar(f"train/{name}", record[name], step)
        for name in ("exact", "cells", "steps_mean"):
            value = record["held_out"][name]
            if value is not None:
                writer.add_scalar(f"held_out/{name}", value, step)
        writer.flush()

    with contextlib.closing(writer):
        yield write
