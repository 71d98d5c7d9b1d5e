"""The reference itself on fixed buffers, so that a CUDA graph replays it: for what no kernel runs.

Its operators are PyTorch's, so every field of a block and every factor of a step is right by
construction, and the cost of launching them from Python is gone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recurx import reference
from recurx.operands import Operands, Span
from recurx.packed import buffers_of, round_into
from recurx.problem import Problem
from recurx.specs import NetSpec


class RoundedWeights:
    """All weights as the reference reads them, rounded to the states' dtype but for norms'."""

    def __init__(
        self, nets: Sequence[tuple[str, NetSpec]], dtype: torch.dtype, device: torch.device
    ) -> None:
        blocks = [block for _, spec in nets for block in spec.blocks]
        self.tensors = [t for b in blocks for t in buffers_of(b.slots, dtype, device).values()]

    def fill(self, weights: Sequence[Tensor]) -> RoundedWeights:
        round_into(self.tensors, weights)
        return self


class GraphSlice:
    """x, states and results of `size` samples, and the calls of a span on them.

    The last slice of a batch may hold fewer samples: the rest then holds what was there before, is
    computed and thrown away.
    """

    weights = RoundedWeights

    def __init__(
        self, problem: Problem, span: Span, weights: RoundedWeights, size: int, like: Operands
    ) -> None:
        self._problem, self._span = problem, span
        self._nets = problem.bind(weights.tensors)
        self._weights = weights  # its address is in the key of the recording
        self._inputs = [like.x.new_zeros(size, *like.x.shape[1:]) for _ in (like.x, *like.states)]
        self._outputs = [tensor.clone() for tensor in self._inputs[1:]]
        self._rope = None if like.rope is None else tuple(map(torch.empty_like, like.rope))
        mask = like.key_mask
        self._mask = None if mask is None else mask.new_zeros(size, *mask.shape[1:])
        self._seed = None if like.seed is None else torch.empty_like(like.seed)

    def enter(self, operands: Operands, live: slice) -> None:
        """Copy the samples of a slice in, and what may change from call to call."""
        given = [tensor[live] for tensor in (operands.x, *operands.states)]
        slots = [slot[: len(t)] for slot, t in zip(self._inputs, given, strict=True)]
        torch._foreach_copy_(slots, given)
        if operands.rope is not None:
            torch._foreach_copy_(list(self._rope), list(operands.rope))  # type: ignore[arg-type]
        if self._mask is not None:
            self._mask[: len(given[0])].copy_(operands.key_mask[live])
        if self._seed is not None:
            self._seed.copy_(operands.seed)
            self._seed[1].add_(live.start)

    def launch(self) -> None:
        schedule, (x, *states) = self._problem.schedule, self._inputs
        carry = dict(zip(schedule.states, states, strict=True))
        with torch.no_grad():
            beside = self._rope, *self._span, self._seed, self._mask
            out = reference.run(schedule, self._nets, x, carry, *beside)
            torch._foreach_copy_(self._outputs, [out[name] for name in schedule.states])

    def leave(self, results: Sequence[Tensor]) -> None:
        """Copy the states out."""
        slots = [slot[: len(t)] for slot, t in zip(self._outputs, results, strict=True)]
        torch._foreach_copy_(list(results), slots)
