"""What a training run is: one printable value."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from recurx.errors import bad_argument
from recurx.models import ModelConfig, config_class
from recurx.models.losses import HALT_WEIGHT

OPTIMIZERS = ("adam-atan2", "adamw")
LR_DECAYS = ("none", "cosine")


class Sizes(Protocol):
    """What a model must know of the questions: token ids, tokens, rows of the puzzle embedding."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def seq_len(self) -> int: ...

    @property
    def num_puzzle_identifiers(self) -> int: ...


@dataclass(frozen=True)
class TrainConfig:
    """All that determines a run; two runs of one config on one machine are bit-identical.

    Args:
        task: name of the task, options included (`recurx.tasks.get`).
        model: fields of TRMConfig or HRMConfig (`variant` "hrm"); vocab_size, seq_len,
            num_puzzle_identifiers and batch_size follow from the task and from here.
        seed: of weights, data, and exploration.
        batch_size: slots B.
        lr, weight_decay, beta1, beta2, warmup: of the optimiser; warmup is linear, in steps.
        optimizer: "adam-atan2" or "adamw".
        ema: decay of the weight average.
        loss: a key of recurx.models.losses.LOSSES.
        halt_weight: of the halting loss beside the tokens' (published: 0.5). AdamATan2 teaches the
            halting head alike at any weight above 0; a small one leaves the net to the answer.
        puzzle_emb_lr: of the puzzle embedding's sign SGD, where the model has one.
        lr_decay: "none", or "cosine": after the warm-up the learning rates fall along half a
            cosine, to 0 at step `decay_steps`.
        puzzles: a file of Sudokus to train on (`tasks.sudoku.split`) instead of generated ones.
        puzzles_sha256: of that file; None takes whatever is there, and the run fills it in.
        reveal: each drawn puzzle of the file gets 0..reveal blanks filled in.
        hold_out: puzzles of the file that are evaluated on and never trained on.
        grid_positions: learned positions start as row + column (+ box) vectors
            (`recurx.models.starts`).
        grid_mixing: token MLPs start as sums over neighbouring cells (there too).
        started_from: SHA-256 of the checkpoint whose weights the run began with
            (`Trainer.start_from`), None for fresh ones.
    """

    task: str
    model: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    warmup: int = 100
    optimizer: str = "adam-atan2"
    ema: float = 0.999
    loss: str = "stablemax_cross_entropy"
    halt_weight: float = HALT_WEIGHT
    puzzle_emb_lr: float = 1e-4
    lr_decay: str = "none"
    decay_steps: int = 0
    puzzles: str | None = None
    puzzles_sha256: str | None = None
    reveal: int = 0
    hold_out: int = 0
    grid_positions: bool = False
    grid_mixing: bool = False
    started_from: str | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise bad_argument("train", "optimizer", f"one of {OPTIMIZERS}", repr(self.optimizer))
        if self.batch_size < 1:
            raise bad_argument("train", "batch_size", "at least 1", self.batch_size)
        if self.warmup < 0:
            raise bad_argument("train", "warmup", "steps >= 0", self.warmup)
        if not 0 <= self.ema < 1:
            raise bad_argument("train", "ema", "a decay in [0, 1)", self.ema)
        if not self.lr >= 0:
            raise bad_argument("train", "lr", "a number >= 0", self.lr)
        if not self.halt_weight >= 0:
            raise bad_argument("train", "halt_weight", "a number >= 0", self.halt_weight)
        if self.lr_decay not in LR_DECAYS:
            raise bad_argument("train", "lr_decay", f"one of {LR_DECAYS}", repr(self.lr_decay))
        if self.lr_decay != "none" and self.decay_steps <= self.warmup:
            raise bad_argument(
                "train", "decay_steps", f"more steps than the warm-up's {self.warmup}",
                self.decay_steps, "lr_decay falls to 0 there (--steps on the command line).",
            )  # fmt: skip
        if self.puzzles is None and (self.reveal or self.hold_out):
            name = "reveal" if self.reveal else "hold_out"
            raise bad_argument("train", name, "0 without a file of puzzles", getattr(self, name))
        if self.reveal < 0:
            raise bad_argument("train", "reveal", "cells >= 0", self.reveal)
        if self.puzzles is not None and self.hold_out < 1:
            raise bad_argument("train", "hold_out", "at least 1 puzzle", self.hold_out)

    def model_config(self, data: Sizes) -> ModelConfig:
        """The model's configuration, with the sizes of the data, or of the task, filled in."""
        sizes = {
            "vocab_size": data.vocab_size,
            "seq_len": data.seq_len,
            "batch_size": self.batch_size,
            "num_puzzle_identifiers": data.num_puzzle_identifiers,
        }
        config = config_class(self.model.get("variant")).from_dict({**sizes, **self.model})
        if data.num_puzzle_identifiers > 1 and not config.puzzle_emb_ndim:
            raise bad_argument(
                "train", "puzzle_emb_ndim", f"more than 0 for {self.task}, whose puzzles only "
                "their embedding tells apart", 0, "Set it, e.g. --set puzzle_emb_ndim=64.",
            )  # fmt: skip
        return config

    def rate_factor(self, done: Tensor) -> Tensor:
        """The factor of the learning rates after `done` steps (a 0-d fp32 tensor)."""
        factor = ((done + 1) / max(1, self.warmup)).clamp_max(1)
        if self.lr_decay == "cosine":
            share = ((done - self.warmup) / (self.decay_steps - self.warmup)).clamp(0, 1)
            factor = factor * (0.5 + 0.5 * torch.cos(math.pi * share))
        return factor

    def published(self) -> TrainConfig:
        """The config that goes with the weights: it names no folder of this machine."""
        if self.puzzles is None:
            return self
        return dataclasses.replace(self, puzzles=Path(self.puzzles).name)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        return cls(**json.loads(text))
