"""What a training run is: one printable value."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from recurx.errors import bad_argument
from recurx.models import ModelConfig, RecursiveModel, config_class
from recurx.models.losses import HALT_WEIGHT
from recurx.options import file, option

OPTIMIZERS = ("adam-atan2", "adamw", "muon")
LR_DECAYS = ("none", "cosine")
STAGE, STEP_LOSS = r"(\d+)x(\d+)(?:x(\d+))?:(\d+)", re.compile(r"all|last|(?=.*[1-9])\d*\.?\d*")
HOLD_OUT = 256  # of a file of puzzles, on the command line


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

    Fields that are options of `python -m recurx train` say themselves what they mean.

    Args:
        task: name of the task, options included (`recurx.tasks.get`).
        model: fields of TRMConfig or HRMConfig (`variant` "hrm"); vocab_size, seq_len,
            num_puzzle_identifiers and batch_size follow from the task and from here.
        beta1, beta2: of the optimiser.
        puzzle_emb_lr: of the puzzle embedding's sign SGD, where the model has one.
        decay_steps: where `lr_decay` ends.
        puzzles_sha256: of the file `puzzles`; None takes any, and the run fills it in.
        started_from: SHA-256 of the checkpoint whose weights the run began with
            (`Trainer.start_from`), None for fresh ones.

    `depths` and a decay as `step_loss` are CGAR's (arXiv 2511.08653), `depths` and the last step's
    loss RSM's (2603.15641), `random_starts` EqR's (2605.21488), `tries` SIC's (2601.19085),
    `burn_in` Sotaku's (github.com/chenglou/sotaku).
    """

    task: str
    model: dict[str, Any] = field(default_factory=dict)
    seed: int = option(0, "of weights, data, and exploration", least=0)
    batch_size: int = option(64, "samples trained at once (default: the preset's)", least=1)
    lr: float = option(1e-3, "learning rate (default: the preset's)")
    weight_decay: float = option(0.01, "of the optimiser (default: the preset's)", metavar="SHARE")
    beta1: float = 0.9
    beta2: float = 0.95
    warmup: int = option(100, "steps of rising learning rates (default: the preset's)", metavar="N")
    optimizer: str = option("adam-atan2", f"one of {', '.join(OPTIMIZERS)}", metavar="NAME")
    clip_grad_norm: float = option(0.0, "gradients are scaled down to this norm where theirs is "
                                   "larger; 0: never", metavar="NORM")  # fmt: skip
    accumulate: int = option(1, "parts of the batch, computed one after the other for less memory",
                             metavar="PARTS", least=1)  # fmt: skip
    ema: float = option(0.999, "decay of averaged weights (default: the preset's)", metavar="SHARE")
    loss: str = option("stablemax_cross_entropy", "a key of recurx.models.losses.LOSSES",
                       metavar="NAME")  # fmt: skip
    # AdamATan2 teaches the halting head alike at any weight above 0.
    halt_weight: float = option(HALT_WEIGHT, "of the halting loss beside the tokens'; a small one "
                                "leaves the net to the answer", metavar="WEIGHT")  # fmt: skip
    puzzle_emb_lr: float = 1e-4
    lr_decay: str = option("none", "cosine: after the warm-up the learning rates fall along half a "
                           "cosine, to 0 at --steps", choices=LR_DECAYS)  # fmt: skip
    decay_steps: int = 0
    puzzles: str | None = file("train on these Sudokus: lines of 81 digits (0 or . is a blank), or "
                               "a CSV with the columns of Sudoku-Extreme")  # fmt: skip
    puzzles_sha256: str | None = None
    reveal: int = option(0, "fill 0..N blanks of each drawn puzzle of the file", least=1)
    hold_out: int = option(0, "puzzles of the file that are evaluated on and never trained on "
                           f"(default {HOLD_OUT})", least=1)  # fmt: skip
    grid_positions: bool = option(False, "learned positions start as row + column (+ box) vectors")
    grid_mixing: bool = option(False, "token MLPs start as sums over neighbouring cells")
    started_from: str | None = None
    depths: str = option("", "fewer cycles at first: 1x2:300,2x4:600 takes 1 cycle of 2 low calls "
                         "up to step 300, 2 of 4 up to 600, then the model's own; 1x2x8:300 also 8 "
                         "supervision steps at most", metavar="HxL:UNTIL,...")  # fmt: skip
    random_starts: bool = option(False, "samples start at random states, not at the learned ones")
    burn_in: int = option(0, "in one step of five, fresh samples first take N, N/2, .. or N/16 "
                          "supervision steps without gradient", least=1)  # fmt: skip
    step_loss: str = option("all", "which answers of a sample are trained: all, the last, or all, "
                            "with weight W^(step - 1), as in 0.7", metavar="WHICH")  # fmt: skip
    tries: int = option(1, "slots of a sample, at random starts; the best of them trains", least=1)

    def __post_init__(self) -> None:
        filed, parts, batch = self.puzzles is not None, self.accumulate, self.batch_size
        ends = [int(until) for *_, until in re.findall(STAGE, self.depths)]
        rising = re.fullmatch(f"({STAGE}(,|$))*", self.depths) and ends == sorted(set(ends))
        for name, fits, expected in (
            ("optimizer", self.optimizer in OPTIMIZERS, f"one of {OPTIMIZERS}"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("accumulate", parts >= 1 and batch % parts == 0, f"a divisor of the batch of {batch}"),
            ("clip_grad_norm", 0 <= self.clip_grad_norm < math.inf, "a norm, or 0 for none"),
            ("warmup", self.warmup >= 0, "steps >= 0"),
            ("ema", 0 <= self.ema < 1, "a decay in [0, 1)"),
            ("lr", self.lr >= 0, "a number >= 0"),
            ("halt_weight", self.halt_weight >= 0, "a number >= 0"),
            ("lr_decay", self.lr_decay in LR_DECAYS, f"one of {LR_DECAYS}"),
            ("reveal", filed or not self.reveal, "0 without a file of puzzles"),
            ("hold_out", filed or not self.hold_out, "0 without a file of puzzles"),
            ("reveal", self.reveal >= 0, "cells >= 0"),
            ("hold_out", not filed or self.hold_out >= 1, "at least 1 puzzle"),
            ("depths", rising, "stages up to rising steps, as in 1x2:300,2x4x8:600"),
            ("step_loss", STEP_LOSS.fullmatch(self.step_loss), "all, last, or a weight like 0.7"),
            ("burn_in", self.burn_in >= 0, "steps >= 0"),
            ("tries", self.tries == 1 or self.tries * self.random_starts > 1, "1 with one start"),
        ):
            if not fits:
                raise bad_argument("train", name, expected, repr(getattr(self, name)))
        if self.lr_decay != "none" and self.decay_steps <= self.warmup:
            raise bad_argument(
                "train", "decay_steps", f"more steps than the warm-up's {self.warmup}",
                self.decay_steps, "lr_decay falls to 0 there (--steps on the command line).",
            )  # fmt: skip

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
        self._stages(config)  # refuses now what would not fit at its step
        return config

    def _stages(self, full: ModelConfig) -> list[tuple[int, ModelConfig]]:
        """[(the step where it ends, the model's configuration until then)] of `depths`."""
        names = ("H_cycles", "L_cycles", "halt_max_steps")
        found = [[int(n) for n in stage if n] for stage in re.findall(STAGE, self.depths)]
        return [(until, full.replace(**dict(zip(names, n, strict=False)))) for *n, until in found]

    def deepen_(self, model: RecursiveModel, full: ModelConfig, step: float = math.inf) -> bool:
        """Give `model`, which is `full` after all stages, its depth in training step number `step`,
        from 0; whether that changed it."""
        depth = next((depth for until, depth in self._stages(full) if step < until), full)
        if changed := self.depths != "" and model.config != depth:
            model.config, model.inner.schedule = depth, depth.schedule
        return changed

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
