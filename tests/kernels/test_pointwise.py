"""kernels/pointwise.py and the products of kernels/library.py: numerics, places, planted bugs."""

from __future__ import annotations

import threading
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton has no wheel for this platform")
from mutants import planted

from recurx import reference
from recurx.errors import InvalidArgument
from tests.kernels.compare import assert_as_exact, relative_error

DTYPES = (torch.bfloat16, torch.float32)
# [B, T, D]; rows of several, one and no whole program, and rows that are longer than a tile.
SHAPES = [(2, 13, 64), (1, 97, 48), (3, 5, 384), (1, 2, 2500), (1, 300, 40), (0, 5, 16)]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def judge(got, plain, exact) -> None:
    """bf16 by PyTorch's error, which is of one rounding; fp32 by a few of them."""
    if got.dtype == torch.float32 and got.numel():
        error = relative_error(got, exact)
        assert error < 4e-7, f"relative error {error:.3g}"
    else:
        assert_as_exact(got, plain, exact)


def rms(x: torch.Tensor, over_tokens: bool) -> torch.Tensor:
    x = x.transpose(1, 2) if over_tokens else x
    y = reference.rms_norm(x, 1e-5)
    return y.transpose(1, 2) if over_tokens else y


def factors(x: torch.Tensor, over_tokens: bool) -> torch.Tensor:
    return torch.rsqrt(x.square().mean(1 if over_tokens else 2) + 1e-5)


def check_add_rms(module, device, dtype, shape, over_tokens) -> None:
    residual, product = (randn(*shape, seed=s).to(dtype) for s in (0, 1))
    exact = residual.double() + product.double()
    want = rms(exact, over_tokens)
    scale = torch.empty(shape[0], shape[2 if over_tokens else 1], device=device)
    given = [t.to(device) for t in (residual, product)]
    out = torch.empty_like(given[0])
    module.add_rms(*given, out, 1e-5, over_tokens=over_tokens, scale=scale)
    judge(out, rms(residual + product, over_tokens), want)
    torch.testing.assert_close(scale.cpu().double(), factors(exact, over_tokens), rtol=1e-5, atol=0)
    for place in (0, 1):  # of either operand, and with no factors kept
        fresh = [t.clone() for t in given]
        module.add_rms(*fresh, fresh[place], 1e-5, over_tokens=over_tokens)
        assert torch.equal(fresh[place], out)


def check_add_rms_backward(module, device, dtype, shape, over_tokens) -> None:
    x, d_out, product = (randn(*shape, seed=s).to(dtype) for s in range(3))
    y = rms(x.double(), over_tokens).to(dtype)
    scale = factors(x.double(), over_tokens).float()

    def slope(y, scale, d_out, added):  # of what the forward kept: y is rounded
        d = d_out if added is None else d_out + added
        axis = 1 if over_tokens else 2
        return scale.unsqueeze(axis) * (d - y * (d * y).mean(axis, keepdim=True))

    for added in (None, product):
        wide = [None if t is None else t.double() for t in (y, scale, d_out, added)]
        want, plain = slope(*wide), slope(y, scale.to(dtype), d_out, added)
        given = [None if t is None else t.to(device) for t in (y, scale, d_out, added)]
        before = [None if t is None else t.clone() for t in given]
        got = module.add_rms_backward(*given, over_tokens=over_tokens)
        judge(got, plain, want)
        assert all(a is None or torch.equal(a, b) for a, b in zip(given, before, strict=True))


def check_swiglu(module, device, dtype, rows, width) -> None:
    wide = randn(rows, 2 * width, seed=0).to(dtype)
    gate_up = wide.clone().to(device)
    module.swiglu(gate_up, rows)
    gate, up = wide.chunk(2, dim=1)
    exact = F.silu(gate.double()) * up.double()
    judge(gate_up[:, :width], F.silu(gate) * up, exact)
    assert torch.equal(gate_up[:, width:].cpu(), up)


def check_swiglu_backward(module, device, dtype, rows, width) -> None:
    wide, d = randn(rows, 2 * width, seed=0).to(dtype), randn(rows, width, seed=1).to(dtype)

    def middle(wide):
        gate, up = wide.chunk(2, dim=1)
        return F.silu(gate) * up

    (want,) = torch.autograd.grad(middle(leaf := wide.double().requires_grad_()), leaf, d.double())
    (plain,) = torch.autograd.grad(middle(leaf := wide.clone().requires_grad_()), leaf, d)
    gate_up, d_middle = wide.clone().to(device), d.clone().to(device)
    module.middle_backward(gate_up, rows, d_middle)
    judge(gate_up, plain, want)
    judge(d_middle, middle(wide), middle(wide.double()))


@dtypes
@pytest.mark.parametrize("over_tokens", [False, True], ids=["over D", "over T"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("check", [check_add_rms, check_add_rms_backward])
def test_rms(triton_device, check, shape, over_tokens, dtype):
    from recurx.kernels import pointwise

    check(pointwise, triton_device, dtype, shape, over_tokens)


@dtypes
@pytest.mark.parametrize("rows, width", [(7, 96), (3, 1025), (1, 4), (5, 384), (2, 2048), (0, 8)])
def test_swiglu(triton_device, rows, width, dtype):
    from recurx.kernels import middles_backward, pointwise

    check_swiglu(pointwise, triton_device, dtype, rows, width)
    check_swiglu_backward(middles_backward, triton_device, dtype, rows, width)


ROWS, HALVES = ((2, 13, 64), False), (3, 1025)
BUGS = {
    "product is not added": ("x += branch", "x += 0 * branch", check_add_rms, ROWS),
    "padding counts in the mean": ("tl.sum(x * x, 1) / N", "tl.sum(x * x, 1) / COLS",
                                   check_add_rms, ((3, 5, 384), False)),
    "eps dropped": ("/ N + EPS)", "/ N)", None, ROWS),
    "rows over T mixed up": ("wide // R * (R * N) + wide % R", "wide % R * N + wide // R",
                             check_add_rms, ((2, 13, 64), True)),
    "no mean along y": ("(d - normed * along[:, None])", "d", check_add_rms_backward, ROWS),
    "d_out without the product": ("        d += _load(product, at, inside)",
                                  "        d += 0.0", check_add_rms_backward, ROWS),
    "gate and up swapped": ("activated(gate, ACT)\n    if GATED:\n        middle = middle * up",
                            "activated(up, ACT)\n    if GATED:\n        middle = middle * gate",
                            check_swiglu, HALVES),
    "rows of gates run together": ("rows * (2 * WIDTH) + cols", "rows * WIDTH + cols",
                                   check_swiglu, HALVES),
    "slope of silu is sigmoid": ("s * (1.0 + x * (1.0 - s))", "s", check_swiglu_backward, HALVES),
    "d_up of the middle": ("(d * middle)", "(d * gate)", check_swiglu_backward, HALVES),
}  # fmt: skip


def check_eps(module, device, dtype, shape, over_tokens) -> None:
    tiny = [torch.full(shape, 1e-4, dtype=dtype, device=device) for _ in range(3)]
    module.add_rms(*tiny, 1e-5, over_tokens=over_tokens)
    want = rms(torch.full(shape, 2e-4, dtype=torch.float64), over_tokens)
    torch.testing.assert_close(tiny[2].cpu().double(), want, rtol=1e-2, atol=0)


@dtypes
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_rejected(triton_device, bug, dtype, tmp_path):
    old, new, check, sizes = BUGS[bug]
    module = "middles_backward" if check is check_swiglu_backward else "pointwise"
    check = check or check_eps
    check(import_module(f"recurx.kernels.{module}"), triton_device, dtype, *sizes)
    mutant = planted(module, old, new, tmp_path)
    with pytest.raises(AssertionError):
        check(mutant, triton_device, dtype, *sizes)


def test_what_does_not_fit_is_refused(triton_device):
    from recurx.kernels.middles_backward import middle_backward
    from recurx.kernels.pointwise import add_rms, add_rms_backward, swiglu

    x = torch.zeros(2, 3, 4, device=triton_device)
    for bad in (x.double(), x[:, :2], x.transpose(1, 2), x.bfloat16(), x[0]):
        with pytest.raises(InvalidArgument):
            add_rms(x, bad, x, 1e-5)
        with pytest.raises(InvalidArgument):
            add_rms_backward(x, torch.zeros(2, 3, device=triton_device), bad, None)
    with pytest.raises(InvalidArgument, match="scale"):
        add_rms(x, x, x, 1e-5, scale=torch.zeros(2, 4, device=triton_device))
    long = torch.zeros(1, 3000, 1, device=triton_device)
    with pytest.raises(InvalidArgument, match="3000"):
        add_rms(long, long, long, 1e-5, over_tokens=True)
    with pytest.raises(InvalidArgument):
        swiglu(x, 5)
    for d_middle in (x, x.bfloat16()[..., :2]):
        with pytest.raises(InvalidArgument):
            middle_backward(x, 6, d_middle)


# ---- products ------------------------------------------------------------------------------------


@dtypes
def test_products_take_padded_rows_and_run_over_tokens(triton_device, dtype):
    from recurx.kernels.library import multiply

    x, w = randn(2, 33, 48, seed=0).to(triton_device, dtype), randn(40, 64, seed=1)
    w = w.to(triton_device, dtype)
    got = multiply(x, w[:, :48])
    assert_as_exact(got, x.cpu() @ w.cpu()[:, :48].T, x.double().cpu() @ w.double().cpu()[:, :48].T)
    got = multiply(x, w[:, :33], over_tokens=True)  # [B, 40, D]
    want = torch.einsum("nt,btd->bnd", w.double().cpu()[:, :33], x.double().cpu())
    plain = (x.cpu().transpose(1, 2) @ w.cpu()[:, :33].T).transpose(1, 2)
    assert got.is_contiguous()
    assert_as_exact(got, plain, want)
    back = multiply(got, w[:, :33].t(), over_tokens=True)  # [B, T, D]
    assert back.shape == x.shape


def test_products_are_exact_whatever_the_process_set():
    """Every thread's, until the last one is out; then all is as it was."""
    from recurx.kernels.library import exact_products

    matmul = torch.backends.cuda.matmul
    new = hasattr(matmul, "fp32_precision")
    name, loose, exact = ("fp32_precision", "tf32", "ieee") if new else ("allow_tf32", True, False)
    bf16 = "allow_bf16_reduced_precision_reduction"
    split_k = f"{bf16}_split_k"
    before = getattr(matmul, name), getattr(matmul, bf16)
    setattr(matmul, name, loose)
    splits = (False, False) if hasattr(matmul, split_k) else True  # no splitting at all: newer
    setattr(matmul, bf16, splits)
    try:
        entered, leave = threading.Event(), threading.Event()

        def other() -> None:
            with exact_products():
                entered.set()
                leave.wait(60)

        thread = threading.Thread(target=other)
        with exact_products(), exact_products():
            assert not getattr(matmul, split_k, False)
            thread.start()
            assert entered.wait(60)
            assert getattr(matmul, name) == exact and not getattr(matmul, bf16)
        assert getattr(matmul, name) == exact and not getattr(matmul, bf16), "another is inside"
        leave.set()
        thread.join()
        assert getattr(matmul, name) == loose
        now = getattr(matmul, bf16)
        assert (now if splits is True else (now, getattr(matmul, split_k))) == splits
    finally:
        setattr(matmul, name, before[0])
        setattr(matmul, bf16, before[1])


def test_weight_gradients_are_not_rounded_between_calls(triton_device, monkeypatch):
    """By the library where PyTorch multiplies bf16 into fp32, which a stand-in does here."""
    from recurx.kernels import library

    def stand_in(a, b):
        made.append(1)
        return a.float() @ b.float()

    made: list[int] = []
    d, x = (randn(2, 300, n, seed=n).to(triton_device, torch.bfloat16) for n in (24, 40))
    master = torch.zeros(24, 40, device=triton_device)
    want = 3 * torch.einsum("btn,btk->nk", d.double(), x.double())
    sums = []
    for way in (library.product_in_fp32, stand_in):
        monkeypatch.setattr(library, "product_in_fp32", way)
        grads = library.WeightGrads([master, master], [True, False])
        for _ in range(3):
            grads.add(0, d, x)
            grads.add(1, d, x)
        sums.append(grads.take(0))
        assert ((sums[-1] - want).norm() / want.norm()).item() < 1e-6, "a rounding to bf16 is 1e-3"
        assert not grads.take(1).any()
    assert len(made) == 3, "nothing is computed for a weight that wants no gradient"
    strided = d.transpose(1, 2).contiguous().transpose(1, 2)  # as over tokens: by the Triton kernel
    grads.add(0, strided, x)
    assert len(made) == 3 and torch.allclose(3 * grads.take(0), sums[0], rtol=1e-4, atol=1e-2)
