"""Shows a training run: a live bar on a terminal, a line per evaluation elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console

from recurx.cli import output

if TYPE_CHECKING:
    from recurx.train import Progress as StepProgress
    from recurx.train import Report, Trainer

BETWEEN_TEXTS = 0.1  # seconds: on a GPU, reading the loss waits for the step


class TrainingDisplay:
    """Evaluates on held-out examples every `eval_every` steps; asks the run to end at `until`.

    Use as a context manager around `Trainer.run(..., on_step=display.on_step)`. The bar shows the
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
        self._bar = output.progress_bar(
            console, "training", "held-out exact {task.percentage:5.1f} %  {task.fields[text]}"
        )
        self._row = self._bar.add_task("", total=1.0, text="")

    def __enter__(self) -> TrainingDisplay:
        self._bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.stop()

    def on_step(self, progress: StepProgress) -> bool:
        """Called after every training step; True ends the run."""
        if time.monotonic() >= self._next_text:
            self._bar.update(self._row, text=f"step {progress.step}  loss {progress.loss:.3f}")
            self._next_text = time.monotonic() + BETWEEN_TEXTS
        if progress.step % self.eval_every:
            return False
        report = self.evaluate()
        record = {"seconds": progress.seconds, "loss": progress.loss, "lr": self.trainer.lr}
        record |= {"held_out": report.to_dict()}
        self.trainer.log(record)
        self.on_record(progress.step, record)
        self._bar.update(self._row, completed=report.exact)
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
            self._bar.update(self._row, text=f"step {trainer.step}  evaluating")
            self.report = evaluate(
                trainer.averaged(), trainer.task, self.examples, device=trainer.device,
                **self.solve_arguments,
            )  # fmt: skip
            self._evaluated_at = trainer.step
        return self.report
