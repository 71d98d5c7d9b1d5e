"""The training loop: deep supervision over a carry, interruptible at every step.

One step is one supervision step of every slot, one loss, one optimiser step; slots whose sample
halted take fresh ones. Everything that the next step depends on is in `state.safetensors`, so a
run that was stopped and resumed gives the bits of a run that was not (on a CPU, with as many
threads). `model.safetensors` beside it holds the averaged weights for everybody else. The step
itself is a `CapturedStep`: one CUDA graph on a GPU.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recurx import atomic, tasks
from recurx.checkpoint import load_checkpoint, save_checkpoint
from recurx.errors import CheckpointError, InvalidArgument, bad_argument
from recurx.models import (
    ACTLossHead,
    Carry,
    Exploration,
    ModelConfig,
    RecursiveModel,
    build_model,
)
from recurx.models.stablemax import IGNORE
from recurx.tasks.base import PAD, Examples
from recurx.train import metrics, puzzles
from recurx.train import state as state_file
from recurx.train.captured import CapturedStep, tensors_of
from recurx.train.config import TrainConfig
from recurx.train.ema import Average
from recurx.train.interrupts import interrupts
from recurx.train.mixing import grid_mixing_
from recurx.train.optim import AdamATan2, SparseSignSGD
from recurx.train.positions import grid_positions_
from recurx.train.progress import Progress
from recurx.train.queue import SampleQueue
from recurx.train.ranks import Ranks

REASONS = ("", "time", "steps", "interrupted", "stopped")  # a later one tells more
MODEL_FILE, STATE_FILE, METRICS_FILE = "model.safetensors", "state.safetensors", "metrics.jsonl"


class Trainer:
    """One run.

    Args:
        config: what to train (of a resumed run, see `Trainer.resume`).
        folder: where checkpoints and metrics go (made if missing); None keeps all in memory.
        device, backend: where and on what the model runs.
        captured: whether a step is one CUDA graph; None: on a GPU.
        ranks: processes that share the batch; None: those of PyTorch's default process group. All
            must call the same methods in the same order; the first one writes the files.
        on_progress: called with (done, of how many) while the puzzles of a file are solved.

    Attributes:
        split: the two parts of the file of puzzles, None without a file.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        backend: str = "auto",
        captured: bool | None = None,
        ranks: Ranks | None = None,
        on_progress: puzzles.OnProgress = lambda done, total: None,
    ) -> None:
        self.ranks = Ranks.of_this_process() if ranks is None else ranks
        own = self.ranks.own(config.batch_size)
        self.split = None if config.puzzles is None else puzzles.load(config, on_progress)
        if self.split is not None:
            config = puzzles.pinned(config, self.split)
        self.config, self.device = config, torch.device(device)
        self.folder = None if folder is None else Path(folder)
        self.task = tasks.get(config.task)
        self.step, self._saved_at = 0, -1
        self.seconds = 0.0
        self.sampler = puzzles.sampler(config, self.split)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model_config = config.model_config().replace(batch_size=own.stop - own.start)
            self.model = self.make_model(model_config, backend)
            if config.grid_positions:
                grid_positions_(self.model, self.task)
            if config.grid_mixing:
                grid_mixing_(self.model, self.task)
            self.model.to(self.device)
        # Exploration draws from this run's generator, whatever else the process draws.
        self.exploration = Exploration(config.seed, self.device)
        self.exploration.first_slot = own.start
        self.model.exploration = self.exploration
        self.average = Average(self.model, config.ema)
        self.optimizer = self._make_optimizer()
        optimizers = [self.optimizer]
        if model_config.puzzle_emb_ndim:
            rate, decay = config.puzzle_emb_lr, config.weight_decay
            optimizers.append(
                SparseSignSGD(self.model.puzzle_emb.buffers(), rate, decay, self.ranks.world)
            )
        self.queue = SampleQueue(self._draw, config.batch_size, self.device, ranks=self.ranks)
        self.one_step = CapturedStep(
            ACTLossHead(self.model, config.loss, config.halt_weight),
            optimizers,
            self.queue,
            average=self.average,
            schedule=config.rate_factor,
            capture=captured,
        )

    @property
    def carry(self) -> Carry:
        """The carry between steps; every slot is halted before the first."""
        return self.one_step.carry

    @classmethod
    def resume(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        backend: str = "auto",
        captured: bool | None = None,
        ranks: Ranks | None = None,
        puzzles: str | Path | None = None,
        on_progress: puzzles.OnProgress = lambda done, total: None,
        **more: Any,
    ) -> Trainer:
        """The run whose files lie in `folder`, exactly where it was saved.

        Args:
            puzzles: where the run's file of puzzles lies now, if it moved.
            more: what the trainer of a subclass takes besides.

        Raises:
            InvalidArgument: there is no run in `folder`, or its file of puzzles is another one now.
            CheckpointError: its state file is damaged, or of another version.
        """
        path = Path(folder) / STATE_FILE
        if not path.is_file():
            raise InvalidArgument(f"train: nothing to resume in {folder}: no {STATE_FILE} there.")
        values, tensors = state_file.read(path)
        config = TrainConfig.from_json(values["config"])
        if puzzles is not None:
            config = dataclasses.replace(config, puzzles=str(puzzles))
        trainer = cls(
            config, folder, device=device, backend=backend, captured=captured, ranks=ranks,
            on_progress=on_progress, **more,
        )  # fmt: skip
        missing = {"model", "average", "carry", "exploration"} - tensors.keys()
        if missing:
            raise CheckpointError(
                f"{path}: no {', '.join(sorted(missing))} in it: written by another version of "
                f"recurx. {MODEL_FILE} beside it still loads."
            )
        trainer._load(values, tensors)
        return trainer

    def start_from(self, path: str | Path) -> None:
        """Take the weights of a checkpoint; optimiser, data and all else stay those of a new run.

        Fields of the model without weights may differ: numbers of cycles and steps, say.

        Raises:
            InvalidArgument: the run has made steps.
            CheckpointError, FileNotFoundError: of `load_checkpoint`, or its weights do not fit.
        """
        if self.step:
            raise bad_argument("Trainer.start_from", "self", "a run without steps", self.step)
        loaded = load_checkpoint(path)
        fitting = loaded.build(**dataclasses.asdict(self.model.config))
        self.model.load_state_dict(fitting.state_dict())
        for name, weight in self.model.named_parameters():
            self.average.weights[name].copy_(weight.detach())
        self.config = dataclasses.replace(self.config, started_from=puzzles.sha256(path))

    def make_model(self, config: ModelConfig, backend: str) -> RecursiveModel:
        """The untrained model; called once, under the run's seed."""
        return build_model(config, backend)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        settings: dict[str, Any] = {
            "lr": torch.tensor(config.lr, device=self.device),
            "betas": (config.beta1, config.beta2),
            "weight_decay": config.weight_decay,
        }
        if config.optimizer == "adam-atan2":
            return AdamATan2(self.model.parameters(), **settings)
        on_gpu = self.device.type == "cuda"
        return torch.optim.AdamW(self.model.parameters(), **settings, capturable=on_gpu)

    # ---- one step ------------------------------------------------------------------------------

    def train_step(self) -> Progress:
        """One supervision step of every slot, and one optimiser step."""
        start = time.perf_counter()
        self.one_step()
        self.step += 1
        self.seconds += time.perf_counter() - start
        step = self.one_step
        values = step.latest.clone()  # the next step writes there again
        return Progress(self.step, self.seconds, self.config.batch_size, step.names, values)

    def _draw(self, count: int) -> dict[str, Tensor]:
        return self._tensors(self.sampler.draw(count))

    def _tensors(self, examples: Examples) -> dict[str, Tensor]:
        labels = torch.from_numpy(examples.answers)
        return {
            "inputs": torch.from_numpy(examples.inputs),
            "labels": labels.masked_fill(labels == PAD, IGNORE),
            "puzzle_identifiers": torch.from_numpy(examples.identifiers),
        }

    # ---- the run -------------------------------------------------------------------------------

    def run(
        self,
        steps: int | None = None,
        time_budget: float | None = None,
        *,
        save_every: int = 500,
        on_step: Callable[[Progress], bool | None] = lambda progress: None,
    ) -> str:
        """Train until `steps` in total, `time_budget` seconds in this call, or `on_step` is True.

        Ctrl-C (and SIGTERM) end it after the step in progress; a checkpoint is written at the end
        in any case, so the run can be resumed.

        Returns:
            Why it ended: "steps", "time", "stopped" or "interrupted".
        """
        deadline = float("inf") if time_budget is None else time.perf_counter() + time_budget
        stopped = False
        self._tidy()
        with interrupts() as interrupted:
            while True:
                wants = {
                    "stopped": stopped,
                    "interrupted": interrupted.is_set(),
                    "steps": steps is not None and self.step >= steps,
                    "time": time.perf_counter() >= deadline,
                }
                reason = max((REASONS.index(name) for name in wants if wants[name]), default=0)
                reason = self.ranks.agree(reason)  # all ranks end after the same step
                if reason:
                    if self._saved_at != self.step:
                        self.save()
                    return REASONS[reason]
                stopped = bool(on_step(self.train_step()))
                if self.step % save_every == 0:
                    self.save()

    @property
    def lr(self) -> float:
        """The learning rate of the last step; reading it waits for the device."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def held_out_rule(self) -> str:
        """One sentence saying what the held-out examples have that training never has."""
        return self.task.held_out_rule if self.split is None else self.split.rule

    def averaged(self) -> RecursiveModel:
        """A copy of the model with the averaged weights, in evaluation mode."""
        model = copy.deepcopy(self.model).eval()
        self.average.copy_to(model)
        return model

    def held_out(self, count: int) -> Examples:
        """At most `count` distinct examples of the side that training never sees."""
        if self.split is not None:
            return self.split.examples(self.split.held_out[:count])
        return tasks.Sampler(self.task, self.config.seed, "held-out").draw_distinct(count)

    # ---- files ---------------------------------------------------------------------------------

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self.folder is not None and self.ranks.first:
            metrics.append(self.folder / METRICS_FILE, {"step": self.step, **record})

    def save(self) -> None:
        """Write the state, then the averaged model; each appears whole or not at all.

        Killed between the two, the model is one checkpoint older than the state: both work.
        """
        self._saved_at = self.step
        tensors = self._tensors_to_save()
        if self.folder is None or not self.ranks.first:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        values = {
            "config": self.config.to_json(),
            "step": self.step,
            "seconds": self.seconds,
            "sampler": self.sampler.state_dict(),
            "average_updates": self.average.updates,
        }
        state_file.write(self.folder / STATE_FILE, values, tensors)
        config = self.config
        if config.puzzles is not None:  # who gets the weights needs no path of this machine
            config = dataclasses.replace(config, puzzles=Path(config.puzzles).name)
        extra = {"task": config.task, "step": self.step, "train": config.to_json()}
        save_checkpoint(self.folder / MODEL_FILE, self.averaged(), extra)

    def _tensors_to_save(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.weights,
            "optimizer": self.optimizer.state_dict()["state"],
            "carry": state_file.each(self.ranks.gather, vars(self.carry)),
            "queue": self.queue.tensors(),
            "exploration": self.exploration.state,
        }

    def _load(self, values: dict[str, Any], tensors: dict[str, Any]) -> None:
        self.step, self.seconds = values["step"], values["seconds"]
        self.sampler.load_state_dict(values["sampler"])
        self.average.updates = values["average_updates"]
        self.one_step.count.fill_(self.step)
        self.model.load_state_dict(tensors["model"])
        for name, weight in self.average.weights.items():
            weight.copy_(tensors["average"][name])
        saved = {int(index): slots for index, slots in tensors.get("optimizer", {}).items()}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": saved, "param_groups": groups})
        self.queue.load(tensors.get("queue", {}))
        self.exploration.state.copy_(tensors["exploration"])
        carry = state_file.each(lambda every: every[self.queue.own], tensors["carry"])
        carry = Carry(**{key: carry[key] for key in vars(self.carry)})
        for now, before in zip(tensors_of(self.carry), tensors_of(carry), strict=True):
            now.copy_(before)
        self._tidy()

    def _tidy(self) -> None:
        """Remove what a killed run left: parts of files, and metrics later than its state."""
        if self.folder is not None and self.ranks.first:
            metrics.forget_after(self.folder / METRICS_FILE, self.step)
            for name in (METRICS_FILE, STATE_FILE, MODEL_FILE):
                atomic.sweep(self.folder / name)
