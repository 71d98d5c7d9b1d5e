"""The options that experiments share. Each experiment has a class of its own that goes on."""

from __future__ import annotations

from dataclasses import dataclass

import recurx.experiments.tasks  # noqa: F401 - the tasks of their defaults
from recurx.cli import options
from recurx.options import file, option


@dataclass(frozen=True)
class Options(options.Json, options.Machine):
    """Of every experiment, which gives defaults to the first two."""

    seeds: int = option(1, "nets of each kind, seeds 0..N-1", least=1)
    time_budget: float = options.time(60.0, "training of a net at most, of a CPU its own time")
    out: str | None = file("results, plot, and the nets that are finished: started again, it goes "
                           "on (default: runs/experiment-NAME)", "FOLDER")  # fmt: skip
    redraw: bool = option(False, "train nothing: table and plot of result.json in FOLDER")
    no_plot: bool = option(False, "no plot (it needs matplotlib)")
    task: str = option("sudoku-4x4", "what the nets learn", metavar="TASK")
    preset: str = option("tiny-mlp", "model and its settings, as in `train`", metavar="NAME")
    count: int = option(1000, "held-out examples of the final accuracy", least=1)


@dataclass(frozen=True)
class TrainedNets(Options):
    """Of experiments that say how their nets are trained."""

    batch_size: int = option(64, "samples that are trained at once", least=1)
    lr: float = option(2e-3, "learning rate")
