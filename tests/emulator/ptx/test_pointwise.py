"""The pointwise kernels from the PTX that Triton emits; what they write in memory is watched."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from recurx import BlockSpec, reference
from recurx.noise import DROPS
from recurx.operands import Beside
from recurx.specs import NO_MIXER

from .. import build
from .test_backward_kernels import d_rms, normed
from .test_kernels import randn

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))


def rms(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    factor = torch.rsqrt(x.square().mean(-1) + 1e-5)
    return x * factor[..., None], factor


def add_rms(over_tokens: bool):
    """In the place of the residual, the factors kept."""
    from recurx.kernels.pointwise import add_rms

    h, product = (randn(2, 97, 80, seed=s) for s in (0, 1))
    wide = h.double() + product.double()
    scale = torch.empty(2, 80 if over_tokens else 97)
    want, factor = rms(wide.mT if over_tokens else wide)
    want = want.mT if over_tokens else want
    call = lambda: add_rms(h, product, h, 1e-5, over_tokens=over_tokens, scale=scale)  # noqa: E731
    return call, [h, scale], [want, factor]


def add_rms_backward(over_tokens: bool):
    from recurx.kernels.pointwise import add_rms_backward

    x, d_out, product = (randn(2, 97, 80, seed=s) for s in range(3))
    y, scale = normed(x.mT if over_tokens else x)
    d = d_out.double() + product.double()
    want = d_rms(y, scale, d.mT if over_tokens else d)
    y = (y.mT if over_tokens else y).contiguous()
    got = torch.empty_like(y)

    def call() -> None:
        got.copy_(add_rms_backward(y, scale, d_out, product, over_tokens=over_tokens))

    return call, [got], [want.mT if over_tokens else want]


def swiglu(backward: bool):
    """700 columns: the last program's are cut."""
    from recurx.kernels.middles_backward import middle_backward
    from recurx.kernels.pointwise import swiglu

    wide, d_middle = randn(5, 1400, seed=0), randn(5, 700, seed=1)
    leaf = wide.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=1)
    middle = F.silu(gate) * up
    if not backward:
        return lambda: swiglu(wide, 5), [wide], [torch.cat([middle, up], 1).detach()]
    (want,) = torch.autograd.grad(middle, leaf, d_middle.double())
    return lambda: middle_backward(wide, 5, d_middle), [wide, d_middle], [want, middle.detach()]


def drops(over_tokens: bool):
    """The very elements and samples that the reference drops; rows of 14
    (9 over T), not of whole quads."""
    from recurx.kernels.branch import Branch, Drops
    from recurx.kernels.pointwise import add_norm

    h, product = torch.zeros(5, 9, 14).bfloat16(), torch.ones(5, 9, 14).bfloat16()
    if over_tokens:
        h, product = h.mT.contiguous(), product.mT.contiguous()
    spec = BlockSpec(NO_MIXER, 14, 1, dropout=0.25, drop_path=0.5)
    beside = Beside(torch.tensor([2**40 + 1, 3]), call=16, block=1)
    want = reference.dropped(torch.ones(5, 9, 14).double(), spec, "2", beside)
    branch = Branch(drops=Drops(0.25, 0.5, beside.seed, 16, DROPS + 4 * (4 + 4)))
    call = lambda: add_norm(  # noqa: E731
        h, product, None, None, branch=branch, total=h, over_tokens=over_tokens
    )
    return call, [h], [want.mT if over_tokens else want]


def gradients(f, d_out: torch.Tensor, *operands: torch.Tensor) -> list[torch.Tensor]:
    leaves = [operand.double().requires_grad_() for operand in operands]
    return list(torch.autograd.grad(f(*leaves), leaves, d_out.double()))


def add_norm_backward(over_tokens: bool):
    """Layer norms of the branch and of the sum; weights; sums of 25 programs over D, or 40."""
    from recurx.kernels.pointwise import Branch, Norm
    from recurx.kernels.pointwise_backward import add_norm_backward

    h, product, d_out = (randn(2, 97, 80, seed=s) for s in range(3))
    n = 97 if over_tokens else 80
    weight, before, scale = (1 + randn(n, seed=s).float() / 4 for s in range(3, 6))
    scale = scale.to(h.dtype)

    def f(h, product, weight, before, scale):
        rows = [t.mT if over_tokens else t for t in (h, product)]
        branch = F.layer_norm(rows[1], (n,), before)
        out = F.layer_norm(rows[0] * 0.5 + branch * scale, (n,), weight)
        return out.mT if over_tokens else out

    wants = gradients(f, d_out, h, product, weight, before, scale)
    got = [torch.empty_like(t) for t in (h, product, weight, before)] + [torch.empty(n)]

    def call() -> None:
        branch = Branch(norm=Norm("layer", 1e-5, before), learned=scale, skip=0.5)
        d_h, d_product, sums = add_norm_backward(
            h, product, Norm("layer", 1e-5, weight), branch=branch, d_out=d_out,
            over_tokens=over_tokens, wanted=("weight", "before_weight", "learned"),
        )  # fmt: skip
        vectors = (sums[name].sum(0) for name in ("weight", "before_weight", "learned"))
        for to, made in zip(got, (d_h, d_product, *vectors), strict=True):
            to.copy_(made)

    return call, got, wants


def gated_norm_backward(over_tokens: bool):
    from recurx.kernels.middles_backward import gated_norm_backward
    from recurx.kernels.pointwise import Norm

    wide = randn(2, 48, 80, seed=0) if over_tokens else randn(2, 97, 80, seed=0)
    d = randn(*((2, 24, 80) if over_tokens else (2, 97, 40)), seed=1)
    n = 24 if over_tokens else 40
    weight = 1 + randn(n, seed=2).float() / 4

    def f(wide, weight):
        gate, up = (wide.mT if over_tokens else wide).chunk(2, dim=2)
        out = torch.sigmoid(gate) * F.rms_norm(gate * up, (n,), weight, 1e-5)
        return out.mT if over_tokens else out

    wants = [*gradients(f, d, wide, weight), f(wide.double(), weight.double())]
    d_weight = torch.empty(n)

    def call() -> None:
        how = dict(activation="silu", gated=True, of_product=True, over_tokens=over_tokens)
        sums = gated_norm_backward(wide, d, Norm("rms", 1e-5, weight), **how)
        d_weight.copy_(sums.sum(0))

    return call, [wide, d_weight, d], wants


def depthwise_backward(activates: bool):
    from recurx.kernels.middles_backward import depthwise_backward

    x, d_out = (randn(2, 37, 80, seed=s) for s in range(2))
    weight, bias = randn(80, 1, 3, seed=2), randn(80, seed=3)

    def f(x, weight, bias):
        out = F.conv1d(x.mT, weight, bias, padding=1, groups=80).mT
        return F.gelu(out) if activates else out

    wants = gradients(f, d_out, x, weight, bias)
    got = [torch.empty_like(x), torch.empty(80, 1, 3), torch.empty(80)]

    def call() -> None:
        d_x, sums = depthwise_backward(x, weight, bias, d_out, "gelu" if activates else "")
        got[0].copy_(d_x)
        got[1].copy_(sums[:, :3].sum(0).t()[:, None])
        got[2].copy_(sums[:, 3].sum(0))

    return call, got, wants


MAKERS = (
    add_rms, add_rms_backward, swiglu, drops, add_norm_backward, gated_norm_backward,
    depthwise_backward,
)  # fmt: skip
CASES = [(make, flag) for make in MAKERS for flag in (False, True)]


@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize("make, flag", CASES, ids=lambda value: getattr(value, "__name__", value))
def test_pointwise_ptx(arch, make, flag):
    pytest.importorskip("triton")
    from .triton_launch import emulating

    call, written, wants = make(flag)
    with emulating(arch, watch=written):
        call()
    for got, want in zip(written, wants, strict=True):
        error = (got.double() - want).norm() / want.norm()
        assert error < 2**-7, f"relative error {error:.3g}"
