"""The training loop: deep supervision over a carry, interruptible at every step.

One step is one supervision step of every slot, one loss, one optimiser step; slots whose sample
halted take fresh ones. Everything that the next step depends on is in `state.safetensors`, so a
run that was stopped and resumed gives the bits of a run that was not (on a CPU, with as many
threads). `model.safetensors` beside it holds the averaged weights for everybody else. The step
itself is a `CapturedStep`: one CUDA graph on a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recurx.checkpoint import load_checkpoint
from recurx.errors import RunFailed, SaveFailed, bad_argument
from recurx.models import ACTLossHead, Carry, Exploration, ModelConfig, RecursiveModel, build_model
from recurx.models.inner import problem_of_model
from recurx.route import Request, stored
from recurx.train.captured import CapturedStep
from recurx.train.config import TrainConfig
from recurx.train.data import Data, Examples, Judge
from recurx.train.ema import Average
from recurx.train.interrupts import interrupts
from recurx.train.nested import finite, mapped, put_
from recurx.train.optim import make_optimizers
from recurx.train.progress import Progress
from recurx.train.queue import SampleQueue
from recurx.train.ranks import Ranks
from recurx.train.recipe import Recipe
from recurx.train.run_folder import RunFolder
from recurx.train.task_data import open_data
from recurx.verdicts import VERDICTS

REASONS = ("", "time", "steps", "interrupted", "stopped", "diverged")  # a later one tells more
LOOK_EVERY = 100  # steps on a GPU between looks at whether the numbers are finite


class Trainer:
    """One run.

    Args:
        config: what to train (of a resumed run, see `Trainer.resume`).
        folder: where its files go (made if missing); None keeps all in memory.
        data: what it trains on; None: the task, or the file of puzzles, that the config names.
        device, backend: where and on what the model runs.
        captured: whether a step is one CUDA graph; None: on a GPU.
        keep_going: train on, and save, where a loss, a gradient or a weight is not finite.
        ranks: processes that share the batch; None: those of PyTorch's default process group. All
            must call the same methods in the same order; the first one writes the files.
    """

    def __init__(
        self, config: TrainConfig, folder: str | Path | None = None, data: Data | None = None, *,
        device: torch.device | str = "cpu", backend: str = "auto", captured: bool | None = None,
        keep_going: bool = False, ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        self.ranks = Ranks.of_this_process() if ranks is None else ranks
        own = self.ranks.own(config.batch_size)
        self.data = open_data(config) if data is None else data
        self.config, self.device = self.data.pinned(config), torch.device(device)
        self.folder = None if folder is None else Path(folder)
        self.files = RunFolder(self.folder if self.ranks.first else None)
        self.step, self.seconds, self._saved_at, self._kept = 0, 0.0, -1, -1
        self.keep_going, self.signal = keep_going, 0  # the signal that ended the last `run`
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model_config = config.model_config(self.data).replace(batch_size=own.stop - own.start)
            self.model = self.make_model(model_config, backend)
            self.data.prepare_(self.model)
            self.model.to(self.device)
        # Exploration draws from this run's generator, whatever else the process draws.
        self.model.exploration = self.exploration = Exploration(config.seed, self.device)
        self.exploration.first_slot = self.model.inner.first_sample = own.start
        self.average = Average(self.model, config.ema)
        optimizers = make_optimizers(config, self.model, self.ranks.world)
        self.optimizer = optimizers[0]
        self.queue = SampleQueue(self.data.draw, config.batch_size, self.device, ranks=self.ranks)
        head = ACTLossHead(self.model, config.loss, config.halt_weight)
        self.full, recipe = self.model.config, Recipe(config, self.model.config.halt_max_steps)
        if config.tries > 1 or config.step_loss != "all":
            head.weigh = recipe.weigh
        self.one_step = CapturedStep(
            head, optimizers, self.queue, accumulate=config.accumulate,
            clip_grad_norm=config.clip_grad_norm, average=self.average,
            begin=recipe.begin if config.random_starts or config.burn_in else None,
            schedule=config.rate_factor, capture=captured,
        )  # fmt: skip

    @property
    def task(self) -> Judge:
        """Who judges answers, for `recurx.train.evaluate`."""
        return self.data.task

    @property
    def carry(self) -> Carry:
        """The carry between steps; every slot is halted before the first."""
        return self.one_step.carry

    @classmethod
    def resume(cls, folder: str | Path, data: Data | None = None, **how: Any) -> Trainer:
        """The run whose files lie in `folder`, exactly where it was saved.

        Args:
            data: the run's, if it is not where its config says (see `recurx.train.open_data`, and
                `recurx.train.saved_config` for the config).
            how: device, backend, captured, ranks, and what the trainer of a subclass takes besides.

        Raises:
            InvalidArgument: there is no run in `folder`, or its data are others now.
            CheckpointError: its state file is damaged, or of another version.
            RunFailed: it is being trained.
        """
        files = RunFolder(Path(folder))
        values, tensors = files.read()
        with files.explaining():
            config = TrainConfig.from_json(values["config"])
        trainer = cls(config, folder, data, **how)
        trainer.files.known = files.known
        with files.explaining():
            trainer._load(values, tensors)
        with contextlib.suppress(SaveFailed):  # a folder that nobody can write to can be looked at
            trainer.files.tidy(trainer.step)
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
        digest = hashlib.sha256(np.memmap(path, mode="r")).hexdigest()
        self.config = dataclasses.replace(self.config, started_from=digest)

    def make_model(self, config: ModelConfig, backend: str) -> RecursiveModel:
        """The untrained model; called once, under the run's seed."""
        return build_model(config, backend)

    # ---- one step ------------------------------------------------------------------------------

    def train_step(self) -> Progress:
        """One supervision step of every slot, and one optimiser step."""
        start = time.perf_counter()
        if self.config.deepen_(self.model, self.full, self.step):
            self.one_step.record_anew()
        self.one_step()
        self.step += 1
        if self.step == 1 and self.ranks.world > 1:
            # Each rank measured for itself; from here on all take what the first one found, as the
            # state says, and as a resumed run will.
            VERDICTS.pin(self.ranks.first_says(self._routes()))
        self.seconds += time.perf_counter() - start
        step = self.one_step
        values = step.latest.clone()  # the next step writes there again
        return Progress(self.step, self.seconds, self.config.batch_size, step.names, values)

    # ---- the run -------------------------------------------------------------------------------

    def run(
        self, steps: int | None = None, time_budget: float | None = None, *, save_every: int = 500,
        on_step: Callable[[Progress], bool | None] = lambda progress: None,
    ) -> str:  # fmt: skip
        """Train until `steps` in total, `time_budget` seconds in this call, or `on_step` is True.

        Ctrl-C (and SIGTERM) end it after the step in progress; it is saved at the end in any case,
        so that it can be resumed.

        Returns:
            Why it ended: "steps", "time", "stopped" or "interrupted".

        Raises:
            RunFailed: a number is not finite (see `keep_going`), or another run has the folder.
            SaveFailed: a file cannot be written; the last one that could is unchanged.
        """
        deadline = float("inf") if time_budget is None else time.perf_counter() + time_budget
        stopped = False
        with self.files.held(), interrupts() as came:
            self.files.tidy(self.step)
            while True:
                wants = {
                    "diverged": self._diverged(),
                    "stopped": stopped,
                    "interrupted": bool(came),
                    "steps": steps is not None and self.step >= steps,
                    "time": time.perf_counter() >= deadline,
                }
                reason = max((REASONS.index(name) for name in wants if wants[name]), default=0)
                reason = self.ranks.agree(reason)  # all ranks end after the same step
                if REASONS[reason] == "diverged":
                    raise self._divergence()
                if reason:
                    if self._saved_at != self.step:
                        self.save()
                    self.signal = self.ranks.agree(max(came, default=0))
                    return REASONS[reason]
                progress = self.train_step()
                stopped = not self._diverged() and bool(on_step(progress))
                if self.step % save_every == 0:
                    self.save()

    def _diverged(self, now: bool = False) -> bool:
        """Looks at each step where that is free; elsewhere now and then, since it waits."""
        looks = now or self.device.type == "cpu" or self.step % LOOK_EVERY == 0
        return looks and not self.keep_going and self.one_step.diverged() is not None

    def _divergence(self) -> RunFailed:
        step, loss = self.one_step.diverged() or (self.step, float("nan"))
        kept = "nothing was saved before"
        if self._kept > 0 and self.folder:
            kept = f"{self.folder} keeps step {self._kept} (a new run can --start-from its weights)"
        return RunFailed(
            f"the loss, a gradient or a weight is not finite at step {step} (last finite loss "
            f"{loss:.4g}); {kept}. Try a lower --lr, a longer --warmup, or --clip-grad-norm 1; "
            "--keep-going trains on and saves what comes."
        )

    @property
    def lr(self) -> float:
        """The learning rate of the last step; reading it waits for the device."""
        return float(self.optimizer.param_groups[0]["lr"])

    def averaged(self) -> RecursiveModel:
        """A copy of the model with the averaged weights, in evaluation mode."""
        model = copy.deepcopy(self.model).eval()
        self.config.deepen_(model, self.full)
        self.average.copy_to(model)
        return model

    def held_out(self, count: int) -> Examples:
        """At most `count` distinct examples that training never sees."""
        return self.data.held_out(count)

    # ---- files ---------------------------------------------------------------------------------

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        self.files.log({"step": self.step, **record})

    def save(self) -> None:
        """Write the state, then the averaged model; each appears whole or not at all.

        Killed between the two, the model is one save older than the state: both work.

        Raises:
            RunFailed, SaveFailed: as `run` does; nothing is replaced.
        """
        tensors = self._tensors_to_save()  # all ranks give their part
        bad = self._diverged(now=True) or not (self.keep_going or finite(tensors))
        if self.ranks.agree(int(bad)):
            raise self._divergence()
        failed: SaveFailed | RunFailed | None = None
        try:
            self._write(tensors)
        except (SaveFailed, RunFailed) as error:  # the others must not wait for a rank that ends
            failed = error
        if self.ranks.agree(int(failed is not None)):
            raise failed or SaveFailed("train: the first rank could not save.")
        self._saved_at = self._kept = self.step

    def _write(self, tensors: dict[str, Any]) -> None:
        if self.files.path is None:
            return
        values = {
            "config": self.config.to_json(),
            "step": self.step,
            "seconds": self.seconds,
            "sampler": self.data.state_dict(),
            "average_updates": self.average.updates,
            "routes": self._routes(),
        }
        published = self.config.published()
        extra = {"task": published.task, "step": self.step, "train": published.to_json()}
        self.files.write(values, tensors, self.averaged(), extra)

    def _routes(self) -> dict[str, Any]:
        """Which backends `auto` took: a resumed run must take the same, or its bits differ."""
        inner = self.model.inner
        problem = problem_of_model(self.model, len(self.carry.steps) // self.config.accumulate)
        request = Request(inner.backend, inner.save, grad=True)
        return stored(problem, inner.lm_head.weight.device, request)

    def _tensors_to_save(self) -> dict[str, Any]:
        optimizers = enumerate(self.one_step.optimizers)
        return {
            "model": self.model.state_dict(),
            "average": self.average.weights,
            "optimizer": {str(n): each.state_dict()["state"] for n, each in optimizers},
            "carry": mapped(self.ranks.gather, vars(self.carry)),
            "queue": self.queue.tensors(),
            "exploration": self.exploration.state,
        }

    def _load(self, values: dict[str, Any], tensors: dict[str, Any]) -> None:
        self.step = self._kept = values["step"]
        self.seconds = values["seconds"]
        VERDICTS.pin(values.get("routes", {}))
        self.data.load_state_dict(values["sampler"])
        self.average.updates = values["average_updates"]
        self.one_step.count.fill_(self.step)
        self.model.load_state_dict(tensors["model"])
        put_(self.average.weights, {n: tensors["average"][n] for n in self.average.weights})
        of_optimizers = tensors.get("optimizer", {})
        for n, optimizer in enumerate(self.one_step.optimizers):
            saved = {int(index): slots for index, slots in of_optimizers.get(str(n), {}).items()}
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": saved, "param_groups": groups})
        self.queue.load(tensors.get("queue", {}))
        put_(self.exploration.state, tensors["exploration"])
        carry = mapped(lambda every: every[self.queue.own], tensors["carry"])
        put_(self.carry, Carry(**{key: carry.get(key, {}) for key in vars(self.carry)}))
