"""Small random nets, states and schedules that the tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import recurx
from recurx import backends, fp8
from recurx.nets import ATTENTION, TOKEN_MLP, BlockSpec, Net, NetSpec
from recurx.problem import Problem

TOKENS, HIDDEN, INNER, HEADS = 13, 64, 96, 2  # odd T: every tile of every backend has a ragged edge


def make_net(
    kind: str = ATTENTION,
    *,
    tokens: int = TOKENS,
    hidden: int = HIDDEN,
    inner: int = INNER,
    heads: int = HEADS,
    token_inner: int = 32,
    blocks: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    requires_grad: bool = False,
    **fields: Any,
) -> Net:
    """A net with LeCun-normal weights; the same seed gives the same weights in every dtype.

    `fields` are others of `BlockSpec`; biases have a standard deviation of 1/2.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == ATTENTION:
        spec = BlockSpec(ATTENTION, hidden, inner, num_heads=heads, **fields)
    else:
        spec = BlockSpec(TOKEN_MLP, hidden, inner, tokens=tokens, token_inner=token_inner, **fields)
    net_spec = NetSpec((spec,) * blocks)
    weights = [
        (torch.randn(shape, generator=generator) / (*shape, 4)[1] ** 0.5).to(dtype)
        for block in net_spec.blocks
        for shape in block.weight_shapes
    ]
    return Net(net_spec, [w.requires_grad_(requires_grad) for w in weights])


def quantize_net(net: Net, dtype: torch.dtype = fp8.FP8) -> Net:
    """The net with dequantised fp32 weights that the kernels know the codes of."""
    codes = [fp8.quantize_weight(weight, dtype) for weight in net.weights]
    small = Net(net.spec, [each.dequantized() for each in codes])
    for weight, each in zip(small.weights, codes, strict=True):
        fp8.register(weight, each)
    return small


def make_inputs(
    schedule: recurx.Schedule,
    *,
    batch: int = 3,
    tokens: int = TOKENS,
    hidden: int = HIDDEN,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """x and a carry of unit variance, [B, T, D]."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(batch, tokens, hidden, generator=generator).to(dtype)

    return draw(), {name: draw() for name in schedule.states}


def rope(tokens: int = TOKENS, hidden: int = HIDDEN, heads: int = HEADS) -> tuple[Tensor, Tensor]:
    return recurx.rope_tables(tokens, hidden // heads)


def rounded(net: Net, dtype: torch.dtype, to: torch.dtype) -> Net:
    """The net with its weights rounded to `dtype`, held in `to`: what a backend multiplies."""
    return Net(net.spec, [w.detach().to(dtype).to(to) for w in net.weights])


def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def problem_for(
    schedule: recurx.Schedule, nets: dict[str, Net], x: Tensor, needs_grad: bool = False
) -> Problem:
    specs = tuple((name, nets[name].spec) for name in schedule.nets)
    return Problem(schedule, specs, *x.shape, x.dtype, x.device.type, True, needs_grad)


def runnable_backends(kinds: tuple[str, ...] = (ATTENTION, TOKEN_MLP)) -> list[str]:
    """Backends that run small problems of these kinds on this machine's CPU."""
    schedule = recurx.Schedule.trm(1, 1)
    x, _ = make_inputs(schedule)
    return [
        name
        for name in backends.ORDER
        if all(
            backends.why_not(name, problem_for(schedule, {"L": make_net(kind)}, x)) is None
            for kind in kinds
        )
    ]
