"""The fused Triton kernels against PyTorch's operations, at the sizes of TRM-att Sudoku."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.ops import DEVICE, draw
from recurx import reference
from recurx.nets import rope_tables

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device, torch sees none")

TOKENS, HIDDEN, HEADS, INNER = 97, 512, 8, 1536
BATCHES = (1, 8, 64, 512)
WAYS = ("triton", "eager", "compile")


def linear_residual_rms(a, weight, residual):
    return reference.rms_norm(residual + F.linear(a, weight), 1e-5)


def gate_up_swiglu(x, weight):
    gate, up = F.linear(x, weight).chunk(2, dim=-1)
    return F.silu(gate) * up


def attention(qkv):
    q, k, v = (part.transpose(1, 2) for part in qkv.chunk(3, dim=2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def qkv_rope(x, weight):
    heads = F.linear(x, weight).view(*x.shape[:2], 3 * HEADS, HIDDEN // HEADS)
    q, k, v = heads.chunk(3, dim=2)
    tables = rope_tables(TOKENS, HIDDEN // HEADS, device=x.device)
    return torch.cat([*(reference.rope_rotate(part, *tables) for part in (q, k)), v], dim=2)


def operands(name, batch):
    """Small enough weights that outputs have unit variance."""
    rows = (batch, TOKENS)
    bf16 = {"dtype": torch.bfloat16}
    x = draw(*rows, HIDDEN, **bf16)
    if name == "attention":
        return [draw(*rows, 3 * HEADS, HIDDEN // HEADS, **bf16)]
    if name == "qkv_rope":
        return [x, draw(3 * HIDDEN, HIDDEN, seed=1, **bf16) * HIDDEN**-0.5]
    if name == "gate_up_swiglu":
        return [x, draw(2 * INNER, HIDDEN, seed=1, **bf16) * HIDDEN**-0.5]
    k = HIDDEN if name.endswith("-o") else INNER
    return [draw(*rows, k, **bf16), draw(HIDDEN, k, seed=1, **bf16) * k**-0.5, x]


PLAIN = {
    "qkv_rope": qkv_rope,
    "attention": attention,
    "gate_up_swiglu": gate_up_swiglu,
    "linear_residual_rms-o": linear_residual_rms,
    "linear_residual_rms-down": linear_residual_rms,
}


def fused(name):
    import importlib

    stem = name.partition("-")[0]
    kernel = getattr(importlib.import_module(f"recurx.kernels.{stem}"), stem)
    if stem != "qkv_rope":
        return kernel
    tables = rope_tables(TOKENS, HIDDEN // HEADS, device=DEVICE)
    return lambda x, weight: kernel(x, weight, HIDDEN // HEADS, tables)


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
