"""`python -m recurx train TASK`: train with a progress bar, checkpoints and metrics; or resume."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recurx import tasks
from recurx.cli import options
from recurx.errors import InvalidArgument
from recurx.options import file, option
from recurx.train.config import HOLD_OUT, TrainConfig
from recurx.train.presets import PRESETS


@dataclass(frozen=True)
class Options(options.Json, options.Machine):
    task: str | None = option(
        None, f"{', '.join(tasks.names())}; with options as in maze:size=12", flag="", nargs="?"
    )
    preset: str = option("tiny-mlp", f"one of {', '.join(PRESETS)}", metavar="NAME")
    out: str | None = file("default: runs/TASK-PRESET", "FOLDER")
    resume: str | None = file("go on exactly where this run stopped", "FOLDER")
    start_from: str | None = file("a new run with these weights: an easier task's, say")
    steps: int | None = option(None, "train up to this step", least=1)
    time_budget: float | None = options.time(None, "train for so long")
    until: float | None = option(None, "stop at this exact accuracy on held-out examples",
                                 type=float, metavar="SHARE")  # fmt: skip
    eval_every: int = option(200, "steps between evaluations", least=1)
    eval_count: int = option(256, "held-out examples of each evaluation", least=1,
                             most=10**7)  # fmt: skip
    save_every: int = option(500, "steps between checkpoints", least=1)
    write_held_out: str | None = file("write the puzzles of --hold-out as lines of digits")
    set: tuple[tuple[str, Any], ...] = options.settings("a field of the model")
    no_capture: bool = option(False, "on a GPU: launch every kernel, not one CUDA graph a step")
    keep_going: bool = option(False, "train on, and save, where the loss is not finite any more")
    tensorboard: bool = option(False, "also write event files to FOLDER/tensorboard")
    config: dict[str, Any] = options.said(
        TrainConfig, title="what is trained, and how",
        description="What is not given is the preset's, else the default.",
    )  # fmt: skip


def run(asked: Options) -> int:
    from recurx.cli import output
    from recurx.experiments.answering.progress import TrainingDisplay, event_files
    from recurx.train.ranks import join_torchrun

    asked = options.local_device(asked)
    tiny = asked.preset.startswith("tiny")
    device = asked.prepare(options.THREADS_OF_TINY_NETS if tiny else None)
    ranks = join_torchrun(device)
    console = output.make_console(quiet=not ranks.first, stderr=asked.json)
    how = {"device": device, "backend": asked.backend, "keep_going": asked.keep_going}
    how["captured"] = False if asked.no_capture else None
    with output.counting(console, "solved", "puzzles of the file") as on_progress:
        trainer = (_resumed if asked.resume else _started)(asked, on_progress, how)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    console.print(f"{trainer.task.name}: {parameters:,} parameters, training in {trainer.folder}")
    console.print(f"held-out examples: {trainer.data.held_out_rule}")
    if ranks.world > 1:
        console.print(f"{ranks.world} ranks share batches of {trainer.config.batch_size}")
    if asked.write_held_out and trainer.data.split is None:
        raise InvalidArgument("--write-held-out: only with --puzzles.")
    if not ranks.first:  # works, and leaves showing and evaluating to the first
        trainer.run(asked.steps, asked.time_budget, save_every=asked.save_every)
        return trainer.signal and 128 + trainer.signal
    if asked.write_held_out:
        trainer.data.split.write_held_out(asked.write_held_out)
    refined = trainer.model.config.halt_max_steps
    with contextlib.ExitStack() as ends:
        ends.enter_context(trainer.files.held())  # before event files are written there
        more = {"on_record": ends.enter_context(event_files(trainer))} if asked.tensorboard else {}
        display = TrainingDisplay(
            console, trainer, asked.eval_every, asked.eval_count, asked.until, max_steps=refined,
            **more,
        )  # fmt: skip
        ends.enter_context(display.bar)
        reason = trainer.run(
            asked.steps, asked.time_budget, save_every=asked.save_every, on_step=display.on_step
        )
    report = display.evaluate()
    console.print(
        f"{_ENDINGS[reason]} at step {trainer.step}: {report.exact:.1%} of {report.count} held-out "
        f"examples exact, each refined for {refined} steps (eval --halt none --max-steps "
        f"{refined})",
        soft_wrap=True,
    )
    console.print(f"weights: {trainer.folder}/model.safetensors", soft_wrap=True)
    console.print(f"go on with: python -m recurx train --resume {trainer.folder}", soft_wrap=True)
    if asked.json:
        ended = {"step": trainer.step, "ended": reason, "folder": str(trainer.folder)}
        output.json_line(ended | report.to_dict())
    return trainer.signal and 128 + trainer.signal  # as shells report it, though all was saved


_ENDINGS = {
    "steps": "All steps done", "time": "Time is up",
    "stopped": "Accuracy reached", "interrupted": "Interrupted",
}  # fmt: skip


def _started(asked: Options, on_progress: Any, how: dict[str, Any]) -> Any:
    from recurx.train import Trainer, open_data, preset
    from recurx.train.run_folder import STATE_FILE

    if asked.task is None:
        raise InvalidArgument("name a task (sudoku-4x4, sort, ...), or give --resume FOLDER.")
    chosen = dict(asked.config)
    if chosen.get("lr_decay", "none") != "none":
        if asked.steps is None:
            raise InvalidArgument("--lr-decay: say with --steps when the learning rate is to be 0.")
        chosen["decay_steps"] = asked.steps
    if "puzzles" in chosen:
        chosen.setdefault("hold_out", HOLD_OUT)
    elif alone := [name for name in ("reveal", "hold_out") if name in chosen]:
        raise InvalidArgument(f"{options.flags(alone[:1])}: only with --puzzles.")
    config = preset(asked.preset, asked.task, model=dict(asked.set), **chosen)
    folder = asked.out or f"runs/{asked.task.replace(':', '-')}-{asked.preset}"
    if (Path(folder) / STATE_FILE).exists():
        raise InvalidArgument(
            f"{folder} already holds a run: go on with --resume {folder}, or choose another --out."
        )
    trainer = Trainer(config, folder, open_data(config, on_progress=on_progress), **how)
    trainer.files.known = None  # it overwrites nothing, not even what another run saves from now on
    if asked.start_from is not None:
        trainer.start_from(asked.start_from)
    return trainer


def _resumed(asked: Options, on_progress: Any, how: dict[str, Any]) -> Any:
    from recurx.train import Trainer, open_data, saved_config

    data = open_data(
        saved_config(asked.resume), puzzles=asked.config.get("puzzles"), on_progress=on_progress
    )
    trainer = Trainer.resume(asked.resume, data, **how)
    if asked.task not in (None, trainer.config.task):
        raise InvalidArgument(
            f"{asked.resume} is a run of {trainer.config.task}, not of {asked.task}."
        )
    fixed = [name for name in asked.config if name != "puzzles"]
    fixed += [name for name in ("out", "start_from", "set") if getattr(asked, name)]
    if fixed:
        raise InvalidArgument(
            f"--resume goes on as the run was configured: leave out {options.flags(fixed)}."
        )
    return trainer
