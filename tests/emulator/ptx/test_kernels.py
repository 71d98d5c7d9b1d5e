"""Whole kernels from the PTX that nvcc and Triton emit, with the race checker on."""

from __future__ import annotations

import pytest
import torch

from recurx import reference

from .. import build
from .. import gemm_residual_rms as gemm

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
from aot import toolchain  # noqa: E402

from .run import load_ptx  # noqa: E402

needs_nvcc = pytest.mark.skipif(toolchain.find_nvcc() is None, reason="nvcc is not here")

# kernel, arch, the one template that is translated, and a case small enough to be quick in which
# every ring goes round twice and the last row block is not full
NVCC = [
    ("sm80", "80", "ILi128ELi4E", gemm.Case(43, 128, 320)),
    ("sm90a", "90a", "ILi64ELi2E|pack_tape", gemm.Case(200, 128, 832, 2)),
]


@needs_nvcc
@pytest.mark.parametrize("kernel, arch, template, case", NVCC, ids=["sm80", "sm90a"])
def test_nvcc_ptx(kernel, arch, template, case):
    files = gemm.kernels(kernel)
    texts = [toolchain.nvcc_compile(file, arch, to="ptx").cubin.read_text() for file in files]
    library = load_ptx(texts, [*files, "runtime.cu"], wanted=template)
    for seed in (1, 2):
        assert gemm.outcome(library, case, kernel, race=1, seed=seed) == "right"
    assert library.stat("flop") > 0, "the C++ ran in the place of the PTX"


def randn(*shape, seed, scale=1.0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.bfloat16()


def rms(x):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)


def raw_rows(m, n):
    """(rows, their squares as two tiles of columns left them, what the rows are when normalised)"""
    raw = randn(m, n, seed=2, scale=3.0)
    halves = raw.float().square().chunk(2, dim=1)
    return raw, torch.stack([half.sum(1) for half in halves]).contiguous(), rms(raw.double())


def linear():
    from recurx.kernels.linear import linear

    raw, squares, x = raw_rows(70, 256)
    w = randn(80, 256, seed=1, scale=0.06)
    return lambda: linear(raw, w, squares=squares), x @ w.double().T


def linear_residual():
    """The residual is scaled as it is added, and what is left raw is normalised in place."""
    from recurx.kernels.linear import linear_residual, new_squares
    from recurx.kernels.rms import normalise

    raw, squares, x = raw_rows(70, 80)
    a, w = randn(70, 256, seed=0), randn(80, 256, seed=1, scale=0.06)
    sums = new_squares(70, raw)

    def call():
        linear_residual(a, w, raw, sums, squares=squares, out=raw)
        return normalise(raw, sums)

    return call, rms(x + a.double() @ w.double().T)


def linear_residual_rms_over_tokens():
    from recurx.kernels.linear import linear_residual_rms

    middle, w = randn(1, 48, 64, seed=0), randn(97, 64, seed=1, scale=0.1)
    h = randn(1, 97, 48, seed=2).transpose(1, 2)
    x = h.double() + middle.double() @ w.double().T
    return lambda: linear_residual_rms(middle, w, h), rms(x)


def gate_up_swiglu():
    from recurx.kernels.linear import gate_up_swiglu

    raw, squares, x = raw_rows(70, 97)
    w = randn(160, 97, seed=1, scale=0.1)
    gate, up = (x @ w.double().T).chunk(2, dim=1)
    return (
        lambda: gate_up_swiglu(raw, w, squares=squares),
        torch.nn.functional.silu(gate) * up,
    )


def attention():
    from recurx.kernels.attention import attention

    qkv = randn(1, 97, 3, 64, seed=0)
    q, k, v = qkv.double().transpose(1, 2).chunk(3, dim=1)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return lambda: attention(qkv), want


def rotating_attention(tokens):
    from recurx.kernels.attention import attention

    qkv = randn(1, tokens, 3, 64, seed=0)
    angle = torch.arange(tokens)[:, None] * torch.linspace(1, 0.01, 32).repeat(2)
    cos, sin = angle.cos(), angle.sin()
    q, k, v = qkv.chunk(3, dim=2)
    q, k = (reference.rope_rotate(part, cos, sin) for part in (q, k))
    q, k, v = (part.double().transpose(1, 2) for part in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return lambda: attention(qkv, cos_sin=(cos, sin)), want


def rotating_attention_of_one_step():
    return rotating_attention(97)


def rotating_attention_of_many():
    return rotating_attention(200)


def attention_of_padded_keys():
    """Of two samples one sees no key."""
    from recurx.kernels.attention import attention

    qkv, unseen = randn(2, 97, 3, 64, seed=0), torch.arange(97).expand(2, 97) < 70
    unseen = unseen.clone().logical_or_(torch.tensor([[False], [True]]))
    q, k, v = qkv.double().transpose(1, 2).chunk(3, dim=1)
    sees = ~unseen[:1, None, None]
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=sees)
    want[1] = 0
    return lambda: attention(qkv, unseen=unseen), want.transpose(1, 2)


def attention_along_columns():
    """A grid of 97 rows and 2 columns, whose tokens alternate in memory."""
    from recurx.kernels.attention import Heads, attention

    qkv = randn(1, 194, 3, 64, seed=0)
    lines = qkv.double().unflatten(1, (97, 2)).transpose(1, 2)  # sample, column, row
    q, k, v = lines.transpose(2, 3).chunk(3, dim=2)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(2, 3)
    heads = Heads(axial=(97, 2, 0))
    return lambda: attention(qkv, heads=heads), want.transpose(1, 2).flatten(1, 2)


TRITON = [
    linear, linear_residual, linear_residual_rms_over_tokens, gate_up_swiglu, attention,
    rotating_attention_of_one_step, rotating_attention_of_many, attention_of_padded_keys,
    attention_along_columns,
]  # fmt: skip


@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize("make", TRITON, ids=lambda make: make.__name__)
def test_triton_ptx(arch, make):
    pytest.importorskip("triton")
    from .triton_launch import emulating

    call, want = make()
    with emulating(arch):
        got = call().double()
    # One rounding to bf16 of the result, and of the probabilities in attention.
    torch.testing.assert_close(got, want, rtol=2**-7, atol=4e-3)
