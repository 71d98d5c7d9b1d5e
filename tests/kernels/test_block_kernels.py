"""QKV + RoPE, attention and gate-up + SwiGLU against fp64, and a whole block put together."""

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


# ---- the formulas, in the dtype of their tensors ------------------------------------------------
def plain_qkv_rope(x, w, head_dim, cos_sin):
    batch, tokens, d = x.shape
    qkv = (x @ w.T).view(batch, tokens, 3 * d // head_dim, head_dim)
    q, k, v = qkv.chunk(3, dim=2)
    if cos_sin is not None:
        q, k = (reference.rope_rotate(part, *cos_sin) for part in (q, k))
    return torch.cat([q, k, v], dim=2)


def plain_attention(qkv):
    q, k, v = (part.transpose(1, 2) for part in qkv.chunk(3, dim=2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def plain_gate_up(x, w):
    gate, up = (x @ w.T).chunk(2, dim=-1)
    return F.silu(gate) * up


def judge(formula, got, operands, *rest):
    exact = formula(*(t.double().cpu() for t in operands), *rest)
    assert_as_exact(got, formula(*(t.cpu() for t in operands), *rest), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "batch, tokens, d, head_dim, rotate",
    [(1, 97, 128, 64, True), (3, 17, 96, 32, True), (2, 33, 256, 128, True), (1, 5, 64, 64, False)],
)
def test_qkv_rope(triton_device, batch, tokens, d, head_dim, rotate, dtype):
    from recurx.kernels.qkv_rope import qkv_rope

    x = randn(batch, tokens, d, seed=0).to(triton_device, dtype)
    w = randn(3 * d, d, seed=1, scale=d**-0.5).to(triton_device, dtype)
    tables = rope_tables(tokens, head_dim) if rotate else None
    on_device = tuple(t.to(triton_device) for t in tables) if rotate else None
    judge(plain_qkv_rope, qkv_rope(x, w, head_dim, on_device), (x, w), head_dim, tables)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, k, f", [(97, 128, 256), (33, 97, 80), (1, 512, 64)])
def test_gate_up(triton_device, m, k, f, dtype):
    from recurx.kernels.gate_up_swiglu import gate_up_swiglu

    x = randn(m, k, seed=4).to(triton_device, dtype)
    w = randn(2 * f, k, seed=5, scale=k**-0.5).to(triton_device, dtype)
    judge(plain_gate_up, gate_up_swiglu(x, w), (x, w))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_gate_up_through_strides(triton_device, dtype):
    from recurx.kernels.gate_up_swiglu import gate_up_swiglu

    state = randn(2, 97, 64, seed=6).to(triton_device, dtype)
    w = randn(2 * 128, 97, seed=7, scale=97**-0.5).to(triton_device, dtype)
    got = gate_up_swiglu(state.transpose(1, 2), w)
    assert got.shape == (2, 64, 128) and got.is_contiguous()
    judge(lambda s, weight: plain_gate_up(s.transpose(1, 2), weight), got, (state, w))


SPECS = {
    "attention": BlockSpec("attention", hidden=128, inner=256, num_heads=2),
    "token_mlp": BlockSpec("token_mlp", hidden=128, inner=256, tokens=33, token_inner=64),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SPECS)
def test_a_whole_block(triton_device, kind, dtype):
    """The kernels together do what `recurx.reference.block` says."""
    from recurx.kernels.attention import attention
    from recurx.kernels.gate_up_swiglu import gate_up_swiglu
    from recurx.kernels.linear_residual_rms import linear_residual_rms
    from recurx.kernels.qkv_rope import qkv_rope

    spec = SPECS[kind]
    h = randn(2, 33, 128, seed=8).to(triton_device, dtype)
    mixer_in, mixer_out, gate_up, down = weights = [
        randn(*shape, seed=10 + n, scale=shape[1] ** -0.5).to(triton_device, dtype)
        for n, shape in enumerate(spec.weight_shapes)
    ]
    tables = rope_tables(33, 64) if spec.num_heads else None
    if spec.num_heads:
        on_device = tuple(t.to(triton_device) for t in tables)
        mixed = attention(qkv_rope(h, mixer_in, spec.head_dim, on_device)).view(h.shape)
        first = linear_residual_rms(mixed, mixer_out, h)
    else:
        columns = h.transpose(1, 2)
        middle = gate_up_swiglu(columns, mixer_in)
        first = linear_residual_rms(middle, mixer_out, columns).transpose(1, 2)
    got = linear_residual_rms(gate_up_swiglu(first, gate_up), down, first)
    judge(lambda state, *w: reference.block(state, spec, w, tables), got, (h, *weights))


PLANTED = {
    "gate and up swapped": (plain_gate_up, lambda x, w: plain_gate_up(x, torch.roll(w, 80, 0))),
    "silu without its sigmoid": (plain_gate_up, lambda x, w: (x @ w.T)[:, :80] * (x @ w.T)[:, 80:]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bug", PLANTED)
def test_the_tolerance_bites(bug, dtype):
    formula, wrong = PLANTED[bug]
    operands = (randn(33, 97, seed=4).to(dtype), randn(160, 97, seed=5, scale=0.1).to(dtype))
    judge(formula, formula(*operands), operands)
    with pytest.raises(AssertionError, match="relative error"):
        judge(formula, wrong(*operands), operands)


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
    from recurx.kernels.gate_up_swiglu import gate_up_swiglu
    from recurx.kernels.qkv_rope import qkv_rope

    x = torch.zeros(1, 4, 64, device=triton_device)
    with pytest.raises(InvalidArgument, match="`head_dim`"):
        qkv_rope(x, torch.zeros(192, 64, device=triton_device), 48, None)
    with pytest.raises(InvalidArgument, match="`cos`"):
        tables = (torch.zeros(3, 32, device=triton_device),) * 2
        qkv_rope(x, torch.zeros(192, 64, device=triton_device), 32, tables)
    with pytest.raises(InvalidArgument, match="`qkv`"):
        attention(torch.zeros(1, 4, 4, 64, device=triton_device))
    with pytest.raises(InvalidArgument, match="1024 tokens"):
        attention(torch.zeros(1, 1025, 3, 32, device=triton_device))
    with pytest.raises(InvalidArgument, match="`weight`"):
        gate_up_swiglu(x[0], torch.zeros(63, 64, device=triton_device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_backward_needs_is_kept(triton_device, dtype):
    """log2 of the row sums of exp (attention) and the rms's factors, in fp32, beside the result."""
    from recurx.kernels.attention import attention
    from recurx.kernels.linear_residual_rms import linear_residual_rms

    qkv = randn(2, 33, 6, 32, seed=2).to(triton_device, dtype)
    lse = torch.empty(2, 2, 33, device=triton_device)
    assert torch.equal(attention(qkv, lse=lse), attention(qkv))
    q, k, _ = (part.transpose(1, 2).double() for part in qkv.chunk(3, dim=2))
    want = torch.logsumexp(q @ k.mT / 32**0.5, -1) / math.log(2)
    torch.testing.assert_close(lse.double(), want, rtol=0, atol=1e-5)

    a, w, residual = (
        randn(*s, seed=3).to(triton_device, dtype) for s in ((9, 32), (64, 32), (9, 64))
    )
    scale = torch.empty(9, device=triton_device)
    out = linear_residual_rms(a, w, residual, scale=scale)
    assert torch.equal(out, linear_residual_rms(a, w, residual))
    wide = residual.double() + a.double() @ w.double().T
    want = torch.rsqrt(wide.square().mean(-1) + 1e-5)
    torch.testing.assert_close(scale.double(), want, rtol=1e-5, atol=0)
    with pytest.raises(InvalidArgument, match="`scale`"):
        linear_residual_rms(a, w, residual, scale=scale[:5])
