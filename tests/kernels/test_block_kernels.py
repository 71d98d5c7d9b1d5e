"""Attention against fp64, and a whole block put together (products: test_linear.py)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_exact

from recurx import reference
from recurx.errors import InvalidArgument
from recurx.nets import BlockSpec

DTYPES = (torch.bfloat16, torch.float32)


def randn(*shape, seed, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def rope_tables(tokens, head_dim):
    angle = torch.arange(tokens)[:, None] / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.cat([angle, angle], 1).float()
    return angle.cos(), angle.sin()


def plain_attention(qkv):
    q, k, v = (part.transpose(1, 2) for part in qkv.chunk(3, dim=2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def judge(formula, got, operands, *rest):
    exact = formula(*(t.double().cpu() for t in operands), *rest)
    assert_as_exact(got, formula(*(t.cpu() for t in operands), *rest), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "batch, tokens, heads, head_dim",
    [(2, 97, 2, 64), (1, 16, 3, 32), (1, 65, 1, 128), (2, 1, 2, 64), (1, 300, 1, 64)],
)
def test_attention(triton_device, batch, tokens, heads, head_dim, dtype):
    from recurx.kernels.attention import attention

    qkv = randn(batch, tokens, 3 * heads, head_dim, seed=2).to(triton_device, dtype)
    judge(plain_attention, attention(qkv), (qkv,))


def test_attention_of_large_scores(triton_device):
    """Scores far beyond what exp can take: the running maximum keeps them finite."""
    from recurx.kernels.attention import attention

    qkv = 30 * randn(1, 130, 3, 64, seed=3).to(triton_device)
    judge(plain_attention, attention(qkv), (qkv,))


SPECS = {
    "attention": BlockSpec("attention", hidden=128, inner=256, num_heads=2),
    "token_mlp": BlockSpec("token_mlp", hidden=128, inner=256, tokens=33, token_inner=64),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SPECS)
def test_a_whole_block(triton_device, kind, dtype):
    """The kernels together do what `recurx.reference.block` says."""
    from recurx.kernels.block import Scratch, run_call
    from recurx.kernels.rms import normalise

    spec = SPECS[kind]
    h = randn(2, 33, 128, seed=8).to(triton_device, dtype)
    weights = [
        randn(*shape, seed=10 + n, scale=shape[1] ** -0.5).to(triton_device, dtype)
        for n, shape in enumerate(spec.weight_shapes)
    ]
    tables = rope_tables(33, 64) if spec.num_heads else None
    on_device = tuple(t.to(triton_device) for t in tables) if tables else None
    got, scratch = h.clone(), Scratch(Scratch.elements(spec, 2, 33), h)
    run_call(got, [spec], [weights], on_device, scratch)
    normalise(got, scratch.squares)
    judge(lambda state, *w: reference.block(state, spec, w, tables), got, (h, *weights))


ATTENTION_BUGS = {
    "padded keys not masked": lambda q, k, v: (q, F.pad(k, (0, 0, 0, 31)), F.pad(v, (0, 0, 0, 31))),
    "last key dropped": lambda q, k, v: (q, k[..., :-1, :], v[..., :-1, :]),
    "scale of another head_dim": lambda q, k, v: (q * 2**-0.5, k, v),
    "rope dropped": lambda q, k, v: (q.roll(1, -2), k, v),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bug", ATTENTION_BUGS)
def test_the_attention_tolerance_bites(bug, dtype):
    qkv = randn(1, 33, 6, 64, seed=2).to(dtype)
    parts = (part.transpose(1, 2) for part in qkv.chunk(3, dim=2))
    wrong = F.scaled_dot_product_attention(*ATTENTION_BUGS[bug](*parts)).transpose(1, 2)
    judge(plain_attention, plain_attention(qkv), (qkv,))
    with pytest.raises(AssertionError, match="relative error"):
        judge(plain_attention, wrong, (qkv,))


def test_bad_arguments_are_named(triton_device):
    from recurx.kernels.attention import attention

    with pytest.raises(InvalidArgument, match="`qkv`"):
        attention(torch.zeros(1, 4, 4, 64, device=triton_device))
    with pytest.raises(InvalidArgument, match="1024 tokens"):
        attention(torch.zeros(1, 1025, 3, 32, device=triton_device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_backward_needs_is_kept(triton_device, dtype):
    """log2 of the row sums of exp, in fp32, beside the result."""
    from recurx.kernels.attention import attention

    qkv = randn(2, 33, 6, 32, seed=2).to(triton_device, dtype)
    lse = torch.empty(2, 2, 33, device=triton_device)
    assert torch.equal(attention(qkv, lse=lse), attention(qkv))
    q, k, _ = (part.transpose(1, 2).double() for part in qkv.chunk(3, dim=2))
    want = torch.logsumexp(q @ k.mT / 32**0.5, -1) / math.log(2)
    torch.testing.assert_close(lse.double(), want, rtol=0, atol=1e-5)
