"""`python -m recurx train TASK`: train with a progress bar, checkpoints and metrics; or resume."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any

from recurx import tasks
from recurx.cli import options

# What a command-line option is called in TrainConfig.
HYPERPARAMETERS = {
    "batch_size": options.positive, "lr": float, "weight_decay": float, "warmup": int,
    "ema": float, "optimizer": str, "loss": str, "halt_weight": float,
}  # fmt: skip
STARTS = ("grid_positions", "grid_mixing")
FIXED = (*HYPERPARAMETERS, *STARTS, "lr_decay", "reveal", "hold_out", "out", "start_from")
HOLD_OUT = 256  # of a file of puzzles, unless --hold-out says otherwise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", nargs="?", help=f"{', '.join(tasks.NAMES)}; with options as in "
                        "maze:size=12")  # fmt: skip
    parser.add_argument("--preset", default="tiny-mlp", help="model and its settings: tiny-mlp "
                        "(default), tiny-att, trm-att, trm-mlp, single-z, hier6, hrm")  # fmt: skip
    parser.add_argument("--out", metavar="FOLDER", help="default: runs/TASK-PRESET")
    parser.add_argument("--resume", metavar="FOLDER", help="go on exactly where this run stopped")
    parser.add_argument("--start-from", metavar="FILE", help="a new run with the weights of this "
                        "checkpoint: an easier task's, say")  # fmt: skip
    parser.add_argument("--steps", type=options.positive, help="train up to this step")
    parser.add_argument("--time-budget", type=options.seconds, metavar="TIME", help="90s, 20m, 2h")
    parser.add_argument("--until", type=float, metavar="SHARE",
                        help="stop at this exact accuracy on held-out examples")  # fmt: skip
    parser.add_argument("--eval-every", type=options.positive, default=200, metavar="STEPS")
    parser.add_argument("--eval-count", type=options.positive, default=256, metavar="N",
                        help="held-out examples of each evaluation (default 256)")  # fmt: skip
    parser.add_argument("--save-every", type=options.positive, default=500, metavar="STEPS")
    parser.add_argument("--seed", type=int, default=0)
    for name, kind in HYPERPARAMETERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    parser.add_argument("--lr-decay", choices=("none", "cosine"), help="cosine: the learning rate "
                        "falls to 0 at --steps")  # fmt: skip
    parser.add_argument("--puzzles", metavar="FILE", help="train on these Sudokus: lines of 81 "
                        "digits (0 or . is a blank), or a CSV with the columns of Sudoku-Extreme",
                        )  # fmt: skip
    parser.add_argument("--reveal", type=options.positive, metavar="N",
                        help="fill 0..N blanks of each drawn puzzle of the file")  # fmt: skip
    parser.add_argument("--hold-out", type=options.positive, metavar="K",
                        help=f"puzzles of the file that are evaluated on and never trained on "
                        f"(default {HOLD_OUT})")  # fmt: skip
    parser.add_argument("--write-held-out", metavar="PATH", help="write them as lines of digits")
    parser.add_argument("--grid-positions", action="store_true", default=None,
                        help="learned positions start as row + column (+ box) vectors",
                        )  # fmt: skip
    parser.add_argument("--grid-mixing", action="store_true", default=None,
                        help="token MLPs start as sums over neighbouring cells")  # fmt: skip
    parser.add_argument("--set", type=options.setting, action="append", default=[],
                        metavar="KEY=VALUE", help="a field of the model, e.g. hidden_size=128",
                        )  # fmt: skip
    parser.add_argument("--no-capture", action="store_true",
                        help="on a GPU: launch every kernel of a step, not one CUDA graph",
                        )  # fmt: skip
    parser.add_argument("--tensorboard", action="store_true",
                        help="also write event files to FOLDER/tensorboard")  # fmt: skip
    options.add_machine(parser)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(arguments: argparse.Namespace) -> int:
    from recurx.cli import output
    from recurx.cli.events import EventFiles
    from recurx.cli.progress import TrainingDisplay, solving_display
    from recurx.errors import InvalidArgument
    from recurx.train.ranks import join_torchrun

    if arguments.threads is None and arguments.preset.startswith("tiny"):
        arguments.threads = options.THREADS_OF_TINY_NETS
    if arguments.device == "cuda" and "LOCAL_RANK" in os.environ:
        arguments.device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = options.prepare_machine(arguments)
    ranks = join_torchrun(device)
    console = output.make_console(quiet=not ranks.first)
    start = _resumed if arguments.resume else _started
    with solving_display(console) as on_progress:
        trainer = start(arguments, device, on_progress)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    console.print(f"{trainer.task.name}: {parameters:,} parameters, training in {trainer.folder}")
    console.print(f"held-out examples: {trainer.data.held_out_rule}")
    if ranks.world > 1:
        console.print(f"{ranks.world} ranks share batches of {trainer.config.batch_size}")
    if arguments.write_held_out and trainer.data.split is None:
        raise InvalidArgument("--write-held-out: only with --puzzles.")
    if not ranks.first:  # works, and leaves showing and evaluating to the first
        trainer.run(arguments.steps, arguments.time_budget, save_every=arguments.save_every)
        return 0
    if arguments.write_held_out:
        trainer.data.split.write_held_out(arguments.write_held_out)
    with contextlib.ExitStack() as ends:
        events = EventFiles(trainer) if arguments.tensorboard else None
        if events is not None:
            ends.callback(events.close)
        display = TrainingDisplay(
            console, trainer, arguments.eval_every, arguments.eval_count, arguments.until,
            max_steps=trainer.model.config.halt_max_steps,
            **({} if events is None else {"on_record": events.write}),
        )  # fmt: skip
        ends.enter_context(display)
        reason = trainer.run(
            arguments.steps, arguments.time_budget,
            save_every=arguments.save_every, on_step=display.on_step,
        )  # fmt: skip
    report = display.evaluate()
    console.print(
        f"{_ENDINGS[reason]} at step {trainer.step}: {report.exact:.1%} of {report.count} held-out "
        f"examples exact"
    )
    console.print(f"weights: {trainer.folder}/model.safetensors", soft_wrap=True)
    console.print(f"go on with: python -m recurx train --resume {trainer.folder}", soft_wrap=True)
    if arguments.json:
        output.json_line(
            {"step": trainer.step, "ended": reason, "folder": str(trainer.folder)}
            | report.to_dict()
        )
    return 0


_ENDINGS = {
    "steps": "All steps done",
    "time": "Time is up",
    "stopped": "Accuracy reached",
    "interrupted": "Interrupted",
}


def _started(arguments: argparse.Namespace, device: Any, on_progress: Any) -> Any:
    from recurx.errors import InvalidArgument
    from recurx.train import Trainer, open_data, preset
    from recurx.train.run_folder import STATE_FILE

    if arguments.task is None:
        raise InvalidArgument("name a task (sudoku-4x4, sort, ...), or give --resume FOLDER.")
    chosen = {
        name: getattr(arguments, name)
        for name in HYPERPARAMETERS
        if getattr(arguments, name) is not None
    }
    chosen |= _chosen_data(arguments)
    config = preset(
        arguments.preset, arguments.task, seed=arguments.seed, model=dict(arguments.set), **chosen
    )
    folder = arguments.out or f"runs/{arguments.task.replace(':', '-')}-{arguments.preset}"
    if (Path(folder) / STATE_FILE).exists():
        raise InvalidArgument(
            f"{folder} already holds a run: go on with --resume {folder}, or choose another --out."
        )
    captured = False if arguments.no_capture else None
    data = open_data(config, on_progress=on_progress)
    trainer = Trainer(
        config, folder, data, device=device, backend=arguments.backend, captured=captured
    )
    if arguments.start_from is not None:
        trainer.start_from(arguments.start_from)
    return trainer


def _chosen_data(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of TrainConfig about the file of puzzles, the start of weights, and the decay."""
    from recurx.errors import InvalidArgument

    chosen: dict[str, Any] = {name: bool(getattr(arguments, name)) for name in STARTS}
    if arguments.lr_decay not in (None, "none"):
        if arguments.steps is None:
            raise InvalidArgument("--lr-decay: say with --steps when the learning rate is to be 0.")
        chosen |= {"lr_decay": arguments.lr_decay, "decay_steps": arguments.steps}
    if arguments.puzzles is not None:
        hold_out = arguments.hold_out or HOLD_OUT
        return chosen | {
            "puzzles": arguments.puzzles, "reveal": arguments.reveal or 0, "hold_out": hold_out
        }  # fmt: skip
    for name in ("reveal", "hold_out"):
        if getattr(arguments, name) is not None:
            raise InvalidArgument(f"--{name.replace('_', '-')}: only with --puzzles.")
    return chosen


def _resumed(arguments: argparse.Namespace, device: Any, on_progress: Any) -> Any:
    from recurx.errors import InvalidArgument
    from recurx.train import Trainer, open_data, saved_config

    data = open_data(
        saved_config(arguments.resume), puzzles=arguments.puzzles, on_progress=on_progress
    )
    trainer = Trainer.resume(
        arguments.resume, data, device=device, backend=arguments.backend,
        captured=False if arguments.no_capture else None,
    )  # fmt: skip
    if arguments.task not in (None, trainer.config.task):
        raise InvalidArgument(
            f"{arguments.resume} is a run of {trainer.config.task}, not of {arguments.task}."
        )
    fixed = [n for n in FIXED if getattr(arguments, n) is not None]
    if fixed or arguments.set:
        names = ", ".join(f"--{n.replace('_', '-')}" for n in fixed or ["set"])
        raise InvalidArgument(f"--resume goes on as the run was configured: leave out {names}.")
    return trainer
