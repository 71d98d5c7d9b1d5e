"""What newer recipes change around a supervision step: where samples begin, and what is trained."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recurx.errors import bad_argument
from recurx.models import Carry
from recurx.solving.halting_loop import fresh_carry, randomise
from recurx.solving.options import Rules
from recurx.train.config import TrainConfig
from recurx.train.nested import mapped, tensors_of

if TYPE_CHECKING:
    from recurx.train.captured import CapturedStep

BURN_IN_SHARE = 0.2  # of the training steps, as in Sotaku


class Recipe:
    """`begin` of a `CapturedStep`, which puts samples into the slots that halted: in groups of
    `tries`, at random starts, after a burn-in; and `weigh` of its `ACTLossHead`."""

    def __init__(self, config: TrainConfig, most: int) -> None:
        self.config, self.tries = config, config.tries
        self.decay = 1.0 if config.step_loss in ("all", "last") else float(config.step_loss)
        self.scale = most / sum(self.decay**step for step in range(most))  # weights have mean 1

    @torch.no_grad()
    def begin(self, step: CapturedStep) -> dict[str, Tensor]:
        """Samples for all slots, of which the carry of `step` holds those that it needs. What is
        drawn follows from (seed; training step, slot)."""
        config, halted = self.config, step.carry.halted.clone()
        if len(halted) // step.accumulate % self.tries or (config.burn_in and step.capturer):
            raise bad_argument(
                "train", "tries, burn_in", "all tries of a sample in a part of the batch, and no "
                "capture of a burn-in", (self.tries, config.burn_in), "(--no-capture)",
            )  # fmt: skip
        slots = torch.arange(len(halted), device=halted.device)
        first = slots - slots % self.tries
        batch = {k: v[first] for k, v in step.queue.take(halted & (slots == first)).items()}
        fresh = fresh_carry(step.head.model, batch)
        if config.random_starts:  # those of a second try, which never has the learned start
            n = step.count.long() * config.batch_size + step.queue.own.start + slots
            randomise(fresh.inner_carry, (2 * n + 1) % 2**32, Rules(rollouts=2, seed=config.seed))
        drawn = random.Random(f"{config.seed} {int(step.count)}") if config.burn_in else None
        if drawn is not None and drawn.random() < BURN_IN_SHARE and halted.any():
            rows = halted.nonzero()[:, 0]
            part = mapped(lambda tensor: tensor[rows], fresh)
            for _ in range(max(1, config.burn_in >> drawn.randrange(5))):
                part, _ = step.head.model(carry=part, batch=part.current_data, training=False)
                part.halted.zero_()  # the model's limit counts steps with gradient
            part.steps.zero_()
            for old, new in zip(tensors_of(fresh), tensors_of(part), strict=True):
                old[rows] = new
        for old, new in zip(tensors_of(step.carry), tensors_of(fresh), strict=True):
            old.copy_(torch.where(halted.view(-1, *[1] * (old.ndim - 1)), new, old))
        return batch

    def weigh(self, carry: Carry, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tries of a sample, only that with the least loss trains, and it decides when all
        of them halt; token losses weigh by `step_loss` too."""
        slots = torch.arange(len(losses), device=losses.device)
        best = (losses.view(-1, self.tries).argmin(1) + slots[:: self.tries])[slots // self.tries]
        carry.halted = carry.halted[best]
        wins = self.tries * (best == slots).to(losses.dtype)
        steps = self.scale * self.decay ** (carry.steps.to(losses.dtype) - 1)
        return wins * (carry.halted if self.config.step_loss == "last" else steps), wins
