"""save="block" on PyTorch: a window that keeps each block's input and computes the rest again."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recurx import reference, reference_backward
from recurx.errors import RecurxError
from recurx.nets import BlockSpec
from recurx.operands import Beside, CosSin, rope_of

DOUBLE_BACKWARD = (
    "recurx.recurse: double backward (create_graph=True) is not supported: the recursion is "
    "differentiable once. For higher derivatives call recurx.reference.run, which is plain PyTorch."
)


class _Block(torch.autograd.Function):
    """`reference.block` whose backward is the written-out one.

    Not torch.utils.checkpoint: that imports torch._dynamo (2 s), and replays random state, where a
    block draws from a counter.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, cos: Tensor | None, sin: Tensor | None, seed: Tensor | None,
        key_mask: Tensor | None, spec: BlockSpec, place: Sequence[int], *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.spec, ctx.place = spec, place
        ctx.save_for_backward(h, cos, sin, seed, key_mask, *weights)
        return reference.block(h, spec, weights, rope_of(cos, sin), Beside(seed, key_mask, *place))

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # only so under create_graph=True
            raise RecurxError(DOUBLE_BACKWARD)
        h, cos, sin, seed, key_mask, *weights = ctx.saved_tensors
        d_h, d_weights = reference_backward.block_backward(
            h, ctx.spec, weights, rope_of(cos, sin), d_out, Beside(seed, key_mask, *ctx.place)
        )
        return d_h, *[None] * 6, *d_weights


def _block(
    h: Tensor, spec: BlockSpec, weights: Sequence[Tensor], cos_sin: CosSin | None, beside: Beside
) -> Tensor:
    given = *(cos_sin or (None, None)), beside.seed, beside.key_mask
    out: Tensor = _Block.apply(h, *given, spec, (beside.call, beside.block), *weights)
    return out


# `reference.run` with the same bits, and gradients by recomputing block by block.
run = functools.partial(reference.run, each=_block)
