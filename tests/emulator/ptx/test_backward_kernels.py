"""The PTX that Triton emits for the backward kernels, in the emulator, with the race checker on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from recurx import reference
from recurx.nets import rope_tables


def randn(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()


def normed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.rsqrt(x.double().square().mean(-1) + 1e-5)
    return (x.double() * scale[..., None]).bfloat16(), scale.float().contiguous()


def d_rms(y: torch.Tensor, scale: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    y, scale, d = y.double(), scale.double()[..., None], d.double()
    return scale * (d - y * (d * y).mean(-1, keepdim=True))


def rms_backward_over_tokens():
    from recurx.kernels.rms_backward import rms_backward

    x, d = (randn(1, 33, 48, seed=s).mT for s in (0, 1))
    y, scale = normed(x)
    return lambda: [rms_backward(y, scale, d)], [d_rms(y, scale, d)]


def forward_that_keeps_the_factors():
    from recurx.kernels.linear import linear_residual, new_squares
    from recurx.kernels.rms import normalise

    a, w, residual = (
        randn(70, 32, seed=0),
        randn(160, 32, seed=1, scale=0.1),
        randn(70, 160, seed=2),
    )
    squares, scale = new_squares(70, residual), torch.empty(70)
    wide = residual.double() + a.double() @ w.double().T
    want = torch.rsqrt(wide.square().mean(-1) + 1e-5)

    def call():
        raw = linear_residual(a, w, residual, squares)
        return [normalise(raw, squares, scale=scale), scale]

    return call, [wide * want[:, None], want]


def dgrad():
    from recurx.kernels.linear import dgrad

    d, w, residual = randn(70, 96, seed=0), randn(96, 80, seed=1, scale=0.1), randn(70, 80, seed=2)
    return lambda: [dgrad(d, w, residual=residual)], [residual.double() + d.double() @ w.double()]


def swiglu_backward():
    from recurx.kernels.swiglu_backward import swiglu_backward

    x, d = (randn(1, 97, 40, seed=s).mT for s in (0, 1))
    gate_up, down = randn(160, 97, seed=2, scale=0.1), randn(97, 80, seed=3, scale=0.1)
    offset = torch.zeros(1, 40, 160, dtype=torch.float64, requires_grad=True)
    gate, up = (x.double() @ gate_up.double().T + offset).chunk(2, dim=-1)
    mid = F.silu(gate) * up
    (want,) = torch.autograd.grad(mid @ down.double().T, offset, d.double())
    return lambda: list(swiglu_backward(x, gate_up, down, d)), [want, mid.detach()]


def wgrad():
    from recurx.kernels.wgrad import new_partial, wgrad, wgrad_sum

    d, x = randn(1100, 40, seed=0, scale=0.05), randn(1100, 48, seed=1)
    partial = new_partial(d, x).fill_(0.5)
    assert partial.shape[0] == 2

    def call():
        wgrad(d, x, partial, add=True)
        return [wgrad_sum(partial, torch.float32)]

    return call, [1.0 + d.double().T @ x.double()]


def attention_backward(tokens: int, rotated: bool = True):
    from recurx.kernels.attention_backward import attention_backward

    qkv, d_out = randn(1, tokens, 3, 64, seed=0), randn(1, tokens, 1, 64, seed=1)
    tables = rope_tables(tokens, 64)
    leaf = qkv.double().requires_grad_()
    q, k, v = leaf.chunk(3, dim=2)
    q, k = (reference.rope_rotate(part, *(t.double() for t in tables)) for part in (q, k))
    out = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
    out = out.transpose(1, 2)
    (want,) = torch.autograd.grad(out, leaf, d_out.double())
    scores = q.transpose(1, 2) @ k.transpose(1, 2).mT / 8
    lse = (torch.logsumexp(scores, -1) * 1.4426950408889634).float().detach().contiguous()
    turned = torch.cat([q, k, v], dim=2).bfloat16().detach()
    given = (turned if rotated else qkv, out.bfloat16().detach(), lse, d_out, tables)
    return lambda: [attention_backward(*given, rotated=rotated)], [want]


def attention_backward_of_one_block():
    return attention_backward(97)


def attention_backward_of_two_kernels():
    return attention_backward(150)


def rotating_attention_backward_of_one_block():
    return attention_backward(97, rotated=False)


def rotating_attention_backward_of_two_kernels():
    return attention_backward(150, rotated=False)


def attention_backward_of_fields(name: str, tokens: int):
    from recurx.kernels.attention_backward import attention_backward

    from tests.kernels.attention_cases import case

    run, gradient = case(name, torch.bfloat16, tokens)
    return lambda: [run(attention_backward)], [gradient(torch.float64)]


def attention_backward_of_fields_of_one_block():
    return attention_backward_of_fields("norm, prefix, gate", 97)


def attention_backward_of_fields_of_two_kernels():
    return attention_backward_of_fields("grouped, causal window", 150)


# All on an sm_90 (wgmma), and on an sm_80 (mma.sync) those whose code differs most.
CASES = [
    ("90", forward_that_keeps_the_factors), ("80", rms_backward_over_tokens),
    ("90", dgrad), ("90", swiglu_backward),
    ("80", dgrad), ("90", wgrad), ("80", wgrad),
    ("90", attention_backward_of_one_block), ("90", attention_backward_of_two_kernels),
    ("80", attention_backward_of_two_kernels),
    ("90", rotating_attention_backward_of_one_block),
    ("90", rotating_attention_backward_of_two_kernels),
    ("80", rotating_attention_backward_of_two_kernels),
    ("90", attention_backward_of_fields_of_one_block),
    ("80", attention_backward_of_fields_of_two_kernels),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("arch, make", CASES, ids=lambda value: getattr(value, "__name__", value))
def test_backward_ptx(arch, make, monkeypatch):
    pytest.importorskip("triton")
    from recurx.kernels import tiles

    from .triton_launch import emulating

    monkeypatch.setattr(tiles, "shared_bytes", lambda device: tiles.SHARED_BYTES[int(arch)])
    call, wants = make()
    with emulating(arch):
        gots = call()
    for got, want in zip(gots, wants, strict=True):
        # Roundings to bf16 of operands between the products, and of the result.
        error = (got.double() - want).norm() / want.norm()
        assert error < 2**-7, f"relative error {error:.3g}"
        worst = (got.double() - want).abs().max() / want.abs().max()
        assert worst < 2**-6, f"largest error {worst:.3g}"
