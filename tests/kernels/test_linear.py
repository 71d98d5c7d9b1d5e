"""kernels/linear.py and rms.py against fp64, with plain PyTorch's own error as the measure.

What is deferred shows only in who reads it: most checks run a product that ends in a norm and a
reader of its raw rows, and judge what the reader makes.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import ERROR_RATIO, assert_as_exact
from mutants import planted

from recurx.errors import InvalidArgument

DTYPES = (torch.bfloat16, torch.float32)
WIDTHS = (48, 64, 128, 384, 512, 768)


def rms(x, eps=1e-5):
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def randn(*shape, seed, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def swiglu(x, w):
    gate, up = (x @ w.T).chunk(2, dim=-1)
    return F.silu(gate) * up


def problem(m, k, n, dtype, device, seed=0):
    a, w = randn(m, k, seed=seed), randn(n, k, seed=seed + 1, scale=k**-0.5)
    # Rows of several sizes: a row that takes its neighbour's factor is far off.
    residual = randn(m, n, seed=seed + 2) * (1 + torch.arange(m) % 3)[:, None]
    return [t.to(device, dtype) for t in (a, w, residual)]


def judge(got, formula, operands, ratio=ERROR_RATIO):
    exact = formula(*(t.double().cpu() for t in operands))
    assert_as_exact(got, formula(*(t.cpu() for t in operands)), exact, ratio)


# ---- a product that ends in a norm, and each of its readers --------------------------------------
READERS = {
    "linear": lambda y, v, a, w: y @ v.T,
    "gate_up_swiglu": lambda y, v, a, w: swiglu(y, v),
    "linear_residual": lambda y, v, a, w: rms(y + a @ w.T),
    "normalise": lambda y, v, a, w: y,
}


def deferred(module, reader, a, w, residual, v):
    """What the reader makes of the raw rows of residual + a @ w^T."""
    from recurx.kernels.rms import normalise

    squares = module.new_squares(a.shape[0], residual)
    raw = module.linear_residual(a, w, residual, squares)
    if reader == "normalise":
        assert normalise(raw, squares) is raw
        return raw
    if reader != "linear_residual":
        return getattr(module, reader)(raw, v, squares=squares)
    others = module.new_squares(a.shape[0], residual).fill_(float("nan"))
    module.linear_residual(a, w, raw, others, squares=squares, out=raw)
    return normalise(raw, others)


def check(module, reader, operands, ratio=ERROR_RATIO):
    """`operands`: a, w, residual and the weight v of the next product."""

    def formula(a, w, residual, v):
        return READERS[reader](rms(residual + a @ w.T), v, a, w)

    judge(deferred(module, reader, *operands), formula, operands, ratio)


def operands_of(m, k, n, dtype, device, columns=80):
    operands = problem(m, k, n, dtype, device)
    return [*operands, randn(columns, n, seed=9, scale=n**-0.5).to(device, dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", WIDTHS)
def test_every_reader_scales(triton_device, n, dtype):
    from recurx.kernels import linear

    operands = operands_of(66, 96, n, dtype, triton_device)
    for reader in READERS:
        check(linear, reader, operands)


@pytest.mark.parametrize("size", [(128, 256), (128, 128), (64, 128), (64, 64), (32, 64)], ids=str)
def test_every_tile(triton_device, size, monkeypatch):
    """Rows and columns that no tile divides, and K that no step divides."""
    from recurx.kernels import linear, tiles

    monkeypatch.setattr(tiles, "PRODUCT_TILES", {2: (size,)})
    tiles.product_tile.cache_clear()
    operands = operands_of(150, 97, 272, torch.bfloat16, triton_device, columns=304)
    squares = linear.new_squares(150, operands[2])
    assert squares.shape[0] == -(-272 // size[1])
    for reader in READERS:
        check(linear, reader, operands)
    tiles.product_tile.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, k", [(1, 64), (97, 512), (194, 1536), (33, 97), (5, 16)])
def test_rows_and_depths(triton_device, m, k, dtype):
    from recurx.kernels import linear

    # fp32 sums of a slab or two are a few ulps from fp64 in both, and chance decides.
    ratio = 1.75 if dtype == torch.float32 and k <= 64 else ERROR_RATIO
    check(linear, "linear", operands_of(m, k, 128, dtype, triton_device), ratio)


def test_in_place_and_reruns_are_bit_equal(triton_device):
    from recurx.kernels.linear import linear_residual, new_squares

    a, w, residual = problem(70, 64, 128, torch.bfloat16, triton_device)
    squares, others = new_squares(70, residual), new_squares(70, residual)
    first = linear_residual(a, w, residual, squares)
    assert torch.equal(first, linear_residual(a, w, residual, others))
    assert torch.equal(squares, others)
    assert linear_residual(a, w, residual, squares, out=residual) is residual
    assert torch.equal(first, residual) and torch.equal(squares, others)


def test_no_rows(triton_device):
    from recurx.kernels.linear import linear_residual, new_squares

    a, w, residual = problem(0, 64, 128, torch.float32, triton_device)
    assert linear_residual(a, w, residual, new_squares(0, residual)).shape == (0, 128)


# ---- planted bugs: each must fail the tolerance above --------------------------------------------
BUGS = {
    "scaled twice": (
        "second = second * scale[:, None]", "second = second * scale[:, None] * scale[:, None]",
    ),
    "residual is not scaled": ("around = around * scale[:, None]", "around = around * 1.0"),
    "residual is not added": ("other=0.0).to(tl.float32)", "other=0.0).to(tl.float32) * 0.0"),
    "squares of half a tile": (" + tl.sum(second * second, 1)", ""),
    "mask one column short": ("& (cols[None, :] < N)", "& (cols[None, :] < N - 1)"),
    "gate and up swapped": (
        "first * tl.sigmoid(first) * second", "second * tl.sigmoid(second) * first",
    ),
    "last slab of K is dropped": ("range(0, end, DEPTH)", "range(0, end - 16, DEPTH)"),
}  # fmt: skip
SCALE_BUGS = {
    "a tile is missing in the sum": ("tl.static_range(1, PARTS)", "tl.static_range(2, PARTS)"),
    "factor of the neighbour row": ("tl.load(squares + rows,", "tl.load(squares + (rows ^ 1),"),
    "mean over the padded width": ("total / WIDTH + EPS", "total / (WIDTH + 16) + EPS"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_rejected(triton_device, bug, dtype, tmp_path):
    assert rejected_by(planted("linear", *BUGS[bug], tmp_path), dtype, triton_device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bug", SCALE_BUGS)
def test_planted_bugs_of_the_factor_are_rejected(triton_device, bug, dtype, tmp_path, monkeypatch):
    """By every reader: each of them reads the factor."""
    from recurx.kernels import linear
    from recurx.kernels import rms as factors

    mutant = planted("rms", *SCALE_BUGS[bug], tmp_path)
    monkeypatch.setattr(factors, "normalise", mutant.normalise)
    monkeypatch.setattr(linear, "row_scale", mutant.row_scale)
    assert rejected_by(linear, dtype, triton_device) == list(READERS)


def rejected_by(module, dtype, device):
    """The readers whose tolerance has seen the bug."""
    operands, rejected = operands_of(34, 144, 160, dtype, device), []
    for reader in READERS:
        try:
            check(module, reader, operands)
        except AssertionError as error:
            assert "relative error" in str(error)
            rejected.append(reader)
    return rejected


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stale_squares_are_rejected(triton_device, reader, dtype, monkeypatch):
    """The sums that another product left: rows of about the same size, and yet seen."""
    from recurx.kernels import linear

    a, w, residual, v = operands_of(34, 96, 160, dtype, triton_device)
    stale = linear.new_squares(34, residual)
    linear.linear_residual(a.flip(0), w, residual, stale)

    def keep(a, w, residual, sums, **more):
        out = real(a, w, residual, sums, **more)
        sums.copy_(stale)
        return out

    real = linear.linear_residual
    monkeypatch.setattr(linear, "linear_residual", keep)
    with pytest.raises(AssertionError, match="relative error"):
        check(linear, reader, [a, w, residual, v])


# ---- whole rows: the norm over tokens ----------------------------------------------------------
def plain_rows(a, w, residual):
    return rms(residual + a @ w.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [17, 97, 300, 600])
def test_token_axis_through_strides(triton_device, tokens, dtype):
    """The token-MLP's tail: rows are (sample, column), columns are tokens, no copy is made."""
    from recurx.kernels.linear import linear_residual_rms

    middle, w, h = problem(2 * 48, 64, tokens, dtype, triton_device)
    state = h.view(2, 48, tokens).transpose(1, 2).contiguous()  # [B, T, D]
    residual = state.transpose(1, 2)
    a, scale = middle.view(2, 48, 64), torch.empty(2, 48, device=triton_device)
    got = linear_residual_rms(a, w, residual, scale=scale)
    assert got.stride() == residual.stride()
    judge(got, plain_rows, (a, w, residual))
    assert torch.equal(got, linear_residual_rms(a, w, residual))
    wide = residual.double() + a.double() @ w.double().T
    want = torch.rsqrt(wide.square().mean(-1) + 1e-5)
    torch.testing.assert_close(scale.double(), want, rtol=1e-5, atol=0)
    with pytest.raises(InvalidArgument, match="`scale`"):
        linear_residual_rms(a, w, residual, scale=scale[:1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_gate_up_through_strides(triton_device, dtype):
    from recurx.kernels.linear import gate_up_swiglu

    state = randn(2, 97, 64, seed=6).to(triton_device, dtype)
    w = randn(2 * 128, 97, seed=7, scale=97**-0.5).to(triton_device, dtype)
    got = gate_up_swiglu(state.transpose(1, 2), w)
    assert got.shape == (2, 64, 128) and got.is_contiguous()
    judge(got, lambda s, weight: swiglu(s.transpose(1, 2), weight), (state, w))


def test_the_factors_of_the_backward_are_kept(triton_device):
    from recurx.kernels.linear import linear_residual, new_squares
    from recurx.kernels.rms import normalise

    a, w, residual = problem(66, 32, 160, torch.bfloat16, triton_device)
    squares, scale = new_squares(66, residual), torch.empty(66, device=triton_device)
    normalise(linear_residual(a, w, residual, squares), squares, scale=scale)
    wide = residual.double() + a.double() @ w.double().T
    want = torch.rsqrt(wide.square().mean(-1) + 1e-5)
    torch.testing.assert_close(scale.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "change, names",
    [
        (lambda a, w, r, s: (a, w[:, :32], r, s), "`weight`"),
        (lambda a, w, r, s: (a[0], w, r, s), "`a`"),
        (lambda a, w, r, s: (a, w, r[:, :32], s), "`residual`"),
        (lambda a, w, r, s: (a, w, r.half(), s), "`residual`"),
        (lambda a, w, r, s: (a.double(), w.double(), r.double(), s), "`a`"),
        (lambda a, w, r, s: (a, w, r, s.repeat(2, 1)), "`sums`"),
        (lambda a, w, r, s: (a, w, r, s[:, :4]), "`sums`"),
    ],
)
def test_bad_arguments_are_named(triton_device, change, names):
    from recurx.kernels.linear import gate_up_swiglu, linear_residual, new_squares

    operands = problem(8, 64, 64, torch.float32, triton_device)
    operands.append(new_squares(8, operands[2]))
    with pytest.raises(InvalidArgument, match=names):
        linear_residual(*change(*operands))
    with pytest.raises(InvalidArgument, match="`sums`"):
        linear_residual(*operands, squares=operands[3])
    with pytest.raises(InvalidArgument, match="`weight`"):
        gate_up_swiglu(operands[0], operands[1][:63])
