"""Halting with exploration by a counter-based generator: no host, no hidden state, any device.

The official code draws from PyTorch's generators. A model with `exploration` set draws from Philox
4x32-10 (Salmon et al., SC 2011) of (seed; slot, count) instead: the same numbers on every device
and in every captured replay, and two integers to save.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recurx import ops, small_ops
from recurx.errors import bad_argument
from recurx.noise import philox


class Exploration:
    """Decides which samples halt, and explores: some must take a random number of steps first.

    Args:
        seed: of all draws; 0..2^63 - 1.
        device: of the model.

    Attributes:
        first_slot: number of the model's first slot, where a batch is shared by several processes.
        state: int64 [2] on the device, (seed, number of draws so far). Save and copy it to resume.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        if not 0 <= seed < 2**63:
            raise bad_argument("models.Exploration", "seed", "0..2^63 - 1", seed)
        self.first_slot = 0
        self.state = torch.tensor([seed, 0], dtype=torch.int64, device=device)

    @torch.no_grad()
    def halt(
        self, steps: Tensor, q_halt: Tensor, q_continue: Tensor | None, most: int,
        probability: float,
    ) -> Tensor:  # fmt: skip
        """Which samples halt now: [B] bool.

        At their last step, or where q_halt > q_continue (> 0 without one); but where a draw says so
        (with `probability`), not before a number of steps drawn from 2..most.

        Args:
            steps: [B] int32, steps of each sample, this one included.
            q_halt, q_continue: [B] logits.
            most: supervision steps a sample may take, at least 2.
        """
        if most < 2:
            raise bad_argument("models.Exploration.halt", "most", "at least 2 steps", most)
        threshold = round(probability * 2**24)
        halted: Tensor = _halt_op(
            steps, q_halt, q_continue, self.state, most, threshold, self.first_slot
        )
        self.state[1:].add_(1)
        return halted


def _halt(
    steps: Tensor, q_halt: Tensor, q_continue: Tensor | None, state: Tensor, most: int,
    threshold: int, first: int,
) -> Tensor:  # fmt: skip
    steps, q_halt = steps.to(torch.int32).contiguous(), q_halt.to(torch.float32).contiguous()
    if q_continue is not None:
        q_continue = q_continue.to(torch.float32).contiguous()
    if small_ops.on_triton(steps):
        from recurx.kernels.act_halt import act_halt

        return act_halt(steps, q_halt, q_continue, state, most, threshold, first)
    slots = first + torch.arange(steps.numel(), device=steps.device)
    count = state[1]
    explored, drawn, _, _ = philox((slots, count & 0x7FFFFFFF, count >> 31, 0), state[0])
    least = torch.where((explored >> 8) < threshold, 2 + (drawn >> 8) % (most - 1), 0)
    wants = (steps >= most) | (q_halt > (0 if q_continue is None else q_continue))
    return wants & (steps >= least)


def _halt_fake(steps: Tensor, *_: object) -> Tensor:
    return torch.empty_like(steps, dtype=torch.bool, memory_format=torch.contiguous_format)


_halt_op = ops._register("recurx::act_halt", _halt, _halt_fake)
