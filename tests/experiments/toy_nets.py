"""Nets and command lines so small that tests of experiments take seconds."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from types import ModuleType

from rich.console import Console

from recurx.cli import options
from recurx.experiments.session import Session
from recurx.experiments.settings import Options
from recurx.train import TrainConfig, preset

TASK = "sort:length=4,values=3"


def arguments_of(module: ModuleType, *words: str) -> Options:
    """The options of an experiment as the command would read them."""
    parser = argparse.ArgumentParser()
    options.add(parser, module.Options)
    return options.read(parser.parse_args(words), module.Options)


def make_session(folder: Path) -> Session:
    return Session(folder, Console(file=io.StringIO()))


def tiny(seed: int = 0, **model: object) -> TrainConfig:
    sizes = {"hidden_size": 16, "num_heads": 2, "halt_max_steps": 2}
    return preset("tiny-mlp", TASK, seed=seed, batch_size=8, model={**sizes, **model})
