"""The fused Triton kernels against PyTorch's operations, at the sizes of TRM-att Sudoku."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from bench.ops import DEVICE, draw
from recurx import reference

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device, torch sees none")

TOKENS, HIDDEN, HEADS, INNER = 97, 512, 8, 1536
BATCHES = (1, 8, 64, 512)
WAYS = ("triton", "eager", "compile")


def linear(x, weight):
    return F.linear(reference.rms_norm(x, 1e-5), weight)


def linear_residual(a, weight, x):
    return reference.rms_norm(x, 1e-5) + F.linear(a, weight)


def gate_up_swiglu(x, weight):
    gate, up = linear(x, weight).chunk(2, dim=-1)
    return F.silu(gate) * up


def attention(qkv):
    q, k, v = (part.transpose(1, 2) for part in qkv.chunk(3, dim=2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def operands(name, batch):
    """Small enough weights that outputs have unit variance."""
    rows = (batch, TOKENS)
    bf16 = {"dtype": torch.bfloat16}
    x = draw(*rows, HIDDEN, **bf16)
    if name == "attention":
        return [draw(*rows, 3 * HEADS, HIDDEN // HEADS, **bf16)]
    if name == "linear-qkv":
        return [x, draw(3 * HIDDEN, HIDDEN, seed=1, **bf16) * HIDDEN**-0.5]
    if name == "gate_up_swiglu":
        return [x, draw(2 * INNER, HIDDEN, seed=1, **bf16) * HIDDEN**-0.5]
    k = HIDDEN if name.endswith("-o") else INNER
    return [draw(*rows, k, **bf16), draw(HIDDEN, k, seed=1, **bf16) * k**-0.5, x]


PLAIN = {
    "linear-qkv": linear,
    "attention": attention,
    "gate_up_swiglu": gate_up_swiglu,
    "linear_residual-o": linear_residual,
    "linear_residual-down": linear_residual,
}


def fused(name):
    """The kernel on raw rows, whose squares are at hand as the product before left them."""
    from recurx.kernels import attention, linear

    stem = name.partition("-")[0]
    if stem == "attention":
        return attention.attention
    kernel = getattr(linear, stem)

    @functools.cache
    def squares(rows):
        sums = [part.float().square().sum(-1).view(-1) for part in rows.chunk(2, -1)]
        return torch.stack(sums).contiguous(), linear.new_squares(sums[0].numel(), rows)

    def run(a, weight, x=None):
        if x is None:
            return kernel(a, weight, squares=squares(a)[0])
        before, sums = squares(x)
        return kernel(a, weight, x, sums, squares=before)

    return run


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", PLAIN)
def test_kernel(timed, check, name, batch, way):
    plain, values = PLAIN[name], operands(name, batch)
    ways = {"triton": fused, "eager": PLAIN.get, "compile": lambda n: torch.compile(PLAIN[n])}
    run = ways[way](name)
    rows = min(batch, 4)
    few = [v[:rows] if v.ndim > 2 else v for v in values]
    check(run(*few), plain(*(v.double() for v in few)).double())
    timed(run, *values)
