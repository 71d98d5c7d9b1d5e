"""kernels/linear_residual_rms.py against fp64, with plain PyTorch's own error as the measure."""

from __future__ import annotations

import pytest
import torch
from compare import assert_as_exact

from recurx.errors import InvalidArgument

DTYPES = (torch.bfloat16, torch.float32)
WIDTHS = (64, 128, 256, 384, 512, 768)


def plain(a, w, residual, eps=1e-5):
    """The formula as separate PyTorch operations, in the dtype of the tensors."""
    x = residual + a @ w.T
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def problem(m, k, n, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(m, k, generator=generator)
    w = torch.randn(n, k, generator=generator) * k**-0.5
    residual = torch.randn(m, n, generator=generator)
    return [t.to(device, dtype) for t in (a, w, residual)]


def check(got, a, w, residual):
    exact = plain(*(t.double().cpu() for t in (a, w, residual)))
    assert_as_exact(got, plain(*(t.cpu() for t in (a, w, residual))), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", WIDTHS)
def test_every_width(triton_device, n, dtype):
    from recurx.kernels.linear_residual_rms import linear_residual_rms

    operands = problem(m=67, k=96, n=n, dtype=dtype, device=triton_device)
    check(linear_residual_rms(*operands), *operands)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, k", [(1, 64), (97, 512), (194, 1536), (33, 97), (5, 16)])
def test_rows_and_depths(triton_device, m, k, dtype):
    from recurx.kernels.linear_residual_rms import linear_residual_rms

    operands = problem(m, k, 128, dtype, triton_device)
    check(linear_residual_rms(*operands), *operands)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [17, 97, 300])
def test_token_axis_through_strides(triton_device, tokens, dtype):
    """The token-MLP's tail: rows are (sample, column), columns are tokens, no copy is made."""
    from recurx.kernels.linear_residual_rms import linear_residual_rms

    middle, w, h = problem(2 * 48, 64, tokens, dtype, triton_device)
    state = h.view(2, 48, tokens).transpose(1, 2).contiguous()  # [B, T, D]
    residual = state.transpose(1, 2)
    a = middle.view(2, 48, 64)
    got = linear_residual_rms(a, w, residual)
    assert got.stride() == residual.stride()
    check(got, a, w, residual)


def test_in_place_and_reruns_are_bit_equal(triton_device):
    from recurx.kernels.linear_residual_rms import linear_residual_rms

    a, w, residual = problem(70, 64, 128, torch.bfloat16, triton_device)
    first = linear_residual_rms(a, w, residual)
    assert torch.equal(first, linear_residual_rms(a, w, residual))
    assert linear_residual_rms(a, w, residual, out=residual) is residual
    assert torch.equal(first, residual)


def test_no_rows(triton_device):
    from recurx.kernels.linear_residual_rms import linear_residual_rms

    a, w, residual = problem(0, 64, 128, torch.float32, triton_device)
    assert linear_residual_rms(a, w, residual).shape == (0, 128)


def scale_by_padded_width(a, w, residual):
    x = residual + a @ w.T
    wide = x.float()
    padded = wide.square().sum(-1, keepdim=True) / 512
    return (wide * torch.rsqrt(padded + 1e-5)).to(x.dtype)


PLANTED = {
    "residual dropped": lambda a, w, r: plain(a, w, torch.zeros_like(r)),
    "mean over the padded width": scale_by_padded_width,
    "last slab of K dropped": lambda a, w, r: plain(a[:, :-16], w[:, :-16], r),
    "mask one column short": lambda a, w, r: torch.cat([plain(a, w, r)[:, :-1], 0 * r[:, :1]], 1),
    "residual 1 % too large": lambda a, w, r: plain(a, w, (r * 1.01).to(r.dtype)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bug", PLANTED)
def test_the_tolerance_bites(bug, dtype):
    operands = problem(67, 96, 384, dtype, "cpu")
    check(plain(*operands), *operands)
    with pytest.raises(AssertionError, match="relative error"):
        check(PLANTED[bug](*operands), *operands)


@pytest.mark.parametrize(
    "change, names",
    [
        (lambda a, w, r: (a, w[:, :32], r), "`weight`"),
        (lambda a, w, r: (a[0], w, r), "`a`"),
        (lambda a, w, r: (a, w, r[:, :32]), "`residual`"),
        (lambda a, w, r: (a, w, r.half()), "`residual`"),
        (lambda a, w, r: (a.double(), w.double(), r.double()), "`a`"),
    ],
)
def test_bad_arguments_are_named(triton_device, change, names):
    from recurx.kernels.linear_residual_rms import linear_residual_rms

    operands = problem(8, 64, 64, torch.float32, triton_device)
    with pytest.raises(InvalidArgument, match=names):
        linear_residual_rms(*change(*operands))
