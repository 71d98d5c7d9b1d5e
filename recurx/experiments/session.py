"""What experiments share: nets trained one after the other, with progress, kept as they finish.

Every finished net is a file in FOLDER/nets. A run that was stopped, or killed, goes on with the
nets that are missing; a net whose settings changed is trained again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from recurx.atomic import write_json
from recurx.cli.output import progress_bar

if TYPE_CHECKING:
    from recurx.train import Report, TrainConfig, Trainer

BETWEEN_TEXTS = 0.2  # seconds


@dataclass(frozen=True)
class Course:
    """When the training of a net ends, and how it is looked at on the way.

    Args:
        seconds: of training at most (see `Session.clock`).
        steps: at most.
        until: ends it at this exact accuracy on held-out examples.
        eval_every: steps between two looks.
        eval_count: held-out examples of a look.
        max_steps: supervision steps of a look.
    """

    seconds: float | None = None
    steps: int | None = None
    until: float | None = None
    eval_every: int = 200
    eval_count: int = 256
    max_steps: int = 16


class Session:
    """One run of one experiment.

    Args:
        folder: where results go; made if missing.
        console: where progress goes.
        device, backend: what the nets run on.
        total: nets to come, for the progress bar.
    """

    def __init__(
        self,
        folder: str | Path,
        console: Console,
        *,
        device: Any = "cpu",
        backend: str = "auto",
        total: int = 1,
    ) -> None:
        self.folder, self.console = Path(folder), console
        self.device, self.backend, self.total = device, backend, total
        self._done = 0

    def clock(self) -> float:
        """Seconds that budgets count: on a CPU those that this process computed, one thread's
        share, so that other work on the machine takes no training away; else wall time."""
        import torch

        if torch.device(self.device).type == "cpu":
            return time.process_time() / torch.get_num_threads()
        return time.perf_counter()

    def net(
        self,
        label: str,
        config: TrainConfig,
        course: Course,
        measure: Callable[[Trainer], dict[str, Any]],
        prepare: Callable[[Trainer], None] | None = None,
        make: Callable[..., Trainer] | None = None,
    ) -> dict[str, Any]:
        """Train one net and measure it; or read what an earlier run measured.

        Args:
            label: what the net is called, in the result and in its file's name.
            config: its training run.
            course: when that ends.
            measure: what is wanted of the trained net, JSON-ready.
            prepare: changes the trainer before its first step.
            make: makes the trainer, from what `Trainer` takes; None: `Trainer`.

        Returns:
            "label", "seed", "parameters", "steps", "seconds" and "ended" of the training,
            "learning" ([{"step", "seconds", "exact"}] on held-out examples), what `measure`
            returned, and "asked": the settings.

        Raises:
            KeyboardInterrupt: Ctrl-C; the nets that are finished are kept.
        """
        prepared = None if prepare is None else prepare.__name__
        settings = {"train": asdict(config), "plan": asdict(course), "prepare": prepared}
        asked = json.loads(json.dumps(settings))
        path = self.folder / "nets" / f"{label.replace(' ', '-')}-seed{config.seed}.json"
        kept = read_json(path)
        self._done += 1
        if kept is not None and kept["asked"] == asked:
            self.console.print(f"  {label}, seed {config.seed}: kept in {path}", soft_wrap=True)
            return kept
        record = self._train(label, config, course, measure, prepare, make) | {"asked": asked}
        write_json(path, record)
        return record

    def _train(
        self,
        label: str,
        config: TrainConfig,
        course: Course,
        measure: Callable[[Trainer], dict[str, Any]],
        prepare: Callable[[Trainer], None] | None,
        make: Callable[..., Trainer] | None,
    ) -> dict[str, Any]:
        from recurx.train import Trainer

        trainer = (make or Trainer)(config, device=self.device, backend=self.backend)
        if prepare is not None:
            prepare(trainer)
        examples = trainer.held_out(course.eval_count)
        learning: list[dict[str, float]] = []
        spent, started = 0.0, self.clock()

        def on_step(progress: Any) -> bool:
            nonlocal spent, started
            spent += self.clock() - started
            show(progress, spent)
            stop = course.seconds is not None and spent >= course.seconds
            if progress.step % course.eval_every == 0:
                exact = look(trainer, course, examples).exact
                learning.append({"step": progress.step, "seconds": spent, "exact": exact})
                told(learning[-1])
                stop = stop or (course.until is not None and exact >= course.until)
            started = self.clock()  # looking is not training
            return stop

        with self._display(label, config.seed, course) as (show, told):
            ended = trainer.run(course.steps, on_step=on_step)
        if ended == "interrupted":
            raise KeyboardInterrupt
        exact = look(trainer, course, examples).exact
        if not learning or learning[-1]["step"] != trainer.step:
            learning.append({"step": trainer.step, "seconds": spent, "exact": exact})
        return {
            "label": label,
            "seed": config.seed,
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "steps": trainer.step,
            "seconds": spent,
            "ended": ended,
            "learning": learning,
            **measure(trainer),
        }

    @contextmanager
    def _display(self, label: str, seed: int, course: Course) -> Iterator[tuple[Any, Any]]:
        """A bar on a terminal, a line per look elsewhere."""
        text = f"net {self._done} of {self.total}: {label}, seed {seed}"
        terminal = self.console.is_terminal
        bar = progress_bar(self.console, text, "{task.fields[text]}")
        row = bar.add_task("", total=1.0, text="")
        exact, next_text = "", 0.0

        def show(progress: Any, spent: float) -> None:
            nonlocal next_text
            if terminal and time.monotonic() >= next_text:
                shares = [spent / course.seconds] if course.seconds else []
                shares += [progress.step / course.steps] if course.steps else []
                loss = f"step {progress.step}  loss {progress.loss:.3f}{exact}"
                bar.update(row, completed=max(shares, default=0), text=loss)
                next_text = time.monotonic() + BETWEEN_TEXTS

        def told(seen: dict[str, float]) -> None:
            nonlocal exact
            exact = f"  held-out exact {seen['exact']:.1%}"
            if not terminal:
                where = f"step {seen['step']:6d}  {seen['seconds']:6.1f} s"
                self.console.print(f"  {text}  {where}{exact}", soft_wrap=True)

        with bar:
            yield show, told


def look(trainer: Trainer, course: Course, examples: Any) -> Report:
    """The averaged weights on `examples`, every one refined for all of `course.max_steps`."""
    from recurx.train import evaluate

    return evaluate(
        trainer.averaged(), trainer.task, examples, device=trainer.device,
        max_steps=course.max_steps, halt=None,
    )  # fmt: skip


def spread(values: list[float]) -> dict[str, Any]:
    """Mean and standard deviation (of a sample; None of one value), lowest and highest."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
    deviation = variance**0.5 if len(values) > 1 else None
    return {
        "mean": mean, "deviation": deviation, "low": min(values), "high": max(values),
        "values": values,
    }  # fmt: skip


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
