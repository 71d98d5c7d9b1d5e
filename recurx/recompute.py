"""save="block" on PyTorch: a window that keeps each block's input and computes the rest again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recurx import reference, reference_backward
from recurx.errors import RecurxError
from recurx.nets import BlockSpec, Net
from recurx.operands import CosSin, rope_of
from recurx.schedule import INPUT, Schedule

DOUBLE_BACKWARD = (
    "recurx.recurse: double backward (create_graph=True) is not supported: the recursion is "
    "differentiable once. For higher derivatives call recurx.reference.run, which is plain PyTorch."
)


class _Block(torch.autograd.Function):
    """`reference.block` whose backward is the written-out one.

    Not torch.utils.checkpoint: that imports torch._dynamo (2 s), and replays random state that a
    block does not have.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        spec: BlockSpec,
        *weights: Tensor,
    ) -> Tensor:
        ctx.spec = spec
        ctx.save_for_backward(h, cos, sin, *weights)
        return reference.block(h, spec, weights, rope_of(cos, sin))

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # only so under create_graph=True
            raise RecurxError(DOUBLE_BACKWARD)
        h, cos, sin, *weights = ctx.saved_tensors
        d_h, d_weights = reference_backward.block_backward(
            h, ctx.spec, weights, rope_of(cos, sin), d_out
        )
        return d_h, None, None, None, *d_weights


def run(
    schedule: Schedule,
    nets: Mapping[str, Net],
    x: Tensor,
    carry: Mapping[str, Tensor],
    cos_sin: CosSin | None,
    start: int,
    stop: int,
) -> dict[str, Tensor]:
    """`reference.run` with the same bits, and gradients by recomputing block by block."""
    cos, sin = cos_sin or (None, None)
    values = {INPUT: x, **carry}
    for step in schedule.steps[start:stop]:
        h, net = reference.call_input(step, values), nets[step.net]
        for spec, weights in net.spec.by_block(net.weights):
            h = _Block.apply(h, cos, sin, spec, *weights)
        values[step.write] = h
    return {name: values[name] for name in carry}
