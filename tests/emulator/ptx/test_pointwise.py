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
    from recurx.kernels.pointwise import swiglu

    wide, d_middle = randn(5, 1400, seed=0), randn(5, 700, seed=1)
    leaf = wide.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=1)
    middle = F.silu(gate) * up
    if not backward:
        return lambda: swiglu(wide, 5), [wide], [torch.cat([middle, up], 1).detach()]
    (want,) = torch.autograd.grad(middle, leaf, d_middle.double())
    return lambda: swiglu(wide, 5, d_middle), [wide, d_middle], [want, middle.detach()]


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


MADE = add_rms, add_rms_backward, swiglu, drops
CASES = [(make, flag) for make in MADE for flag in (False, True)]


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
