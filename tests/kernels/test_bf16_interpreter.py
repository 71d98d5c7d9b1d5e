"""The interpreter's bf16: every operation the kernels use, bit for bit against PyTorch on CPU."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no wheel for this platform")
import bf16_interpreter  # noqa: E402
import triton.language as tl  # noqa: E402
from bf16_interpreter import interpreting  # noqa: E402

BF16 = torch.bfloat16


@triton.jit
def dot_kernel(a, b, c, N: tl.constexpr):
    r = tl.arange(0, N)
    at = r[:, None] * N + r[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def elementwise_kernel(a, b, c, N: tl.constexpr, OP: tl.constexpr):
    r = tl.arange(0, N)
    x = tl.load(a + r)
    y = tl.load(b + r)
    if OP == "add":
        z = x + y
    elif OP == "mul":
        z = x * y
    elif OP == "neg":
        z = -x
    elif OP == "abs":
        z = tl.abs(x)
    elif OP == "maximum":
        z = tl.maximum(x, y)
    elif OP == "where":
        z = tl.where((x < y) & (x > -y), x, y)
    elif OP == "constant":
        z = x + tl.full((N,), 1.7, tl.bfloat16)
    elif OP == "bitcast":
        z = (x.to(tl.int16, bitcast=True) ^ 1).to(tl.bfloat16, bitcast=True)
    elif OP == "cast":
        z = (x.to(tl.float32) * 1.001).to(tl.bfloat16)
    tl.store(c + r, z)


@triton.jit
def masked_sum_kernel(a, c, n, N: tl.constexpr):
    r = tl.arange(0, N)
    x = tl.load(a + r, mask=r < n, other=2.5)
    tl.store(c, tl.sum(x.to(tl.float32), 0))
    tl.store(c + 1, tl.max(x, 0).to(tl.float32))


@triton.jit
def atomic_kernel(c):
    tl.atomic_add(c, tl.full((), 1.0, tl.bfloat16))


EXPECTED = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "neg": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "maximum": torch.maximum,
    "where": lambda x, y: torch.where((x < y) & (x > -y), x, y),
    "constant": lambda x, y: x + torch.tensor(1.7, dtype=BF16),
    "bitcast": lambda x, y: (x.view(torch.int16) ^ 1).view(BF16),
    "cast": lambda x, y: (x.float() * 1.001).to(BF16),
}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


@pytest.mark.parametrize("op", EXPECTED)
def test_elementwise_is_exact(op):
    x, y, got = randn(1024), randn(1024, seed=1), torch.zeros(1024, dtype=BF16)
    with interpreting():
        elementwise_kernel[(1,)](x, y, got, 1024, op)
    assert torch.equal(got, EXPECTED[op](x, y))


def test_casts_round_ties_to_even_and_keep_specials():
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x00000001]
    values = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    got = torch.from_numpy(bf16_interpreter.round_to_bf16(values.numpy()))
    assert torch.equal(got, values.to(BF16).float())
    nan = bf16_interpreter.round_to_bf16(torch.tensor([float("nan")]).numpy())
    assert nan[0] != nan[0]


def test_dot():
    a, b, got = randn(32, 32), randn(32, 32, seed=1), torch.zeros(32, 32)
    with interpreting():
        dot_kernel[(1,)](a, b, got, 32)
    torch.testing.assert_close(got, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_masked_load_and_reductions():
    x, got = randn(16), torch.zeros(2)
    with interpreting():
        masked_sum_kernel[(1,)](x, got, 11, 16)
    filled = torch.cat([x[:11].float(), torch.full((5,), 2.5)])
    torch.testing.assert_close(got, torch.stack([filled.sum(), filled.max()]))


def test_bf16_atomics_are_refused():
    with interpreting(), pytest.raises(Exception, match="bf16 atomics are not interpreted"):
        atomic_kernel[(1,)](torch.zeros(1, dtype=BF16))


def test_the_stock_interpreter_is_wrong():
    """The reason for all this; when it fails, Triton has been mended and the fix can go."""
    a, b, got = randn(32, 32), randn(32, 32, seed=1), torch.zeros(32, 32)
    with interpreting(), bf16_interpreter.stock_bf16():
        dot_kernel[(1,)](a, b, got, 32)
    assert not torch.allclose(got, a.float() @ b.float(), rtol=0.1, atol=0.1)


def test_unknown_internals_are_refused():
    with (
        mock.patch.object(triton, "__version__", "3.99.0"),
        pytest.raises(RuntimeError, match=r"3\.99"),
    ):
        bf16_interpreter.check_internals()
    builder = bf16_interpreter._BUILDER
    with (
        mock.patch.object(builder, "create_bitcast", lambda self, other: None),
        pytest.raises(RuntimeError, match="create_bitcast has parameters"),
    ):
        bf16_interpreter.check_internals()


def test_compiling_ahead_of_time_still_works_after_interpreting():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    with interpreting():
        masked_sum_kernel[(1,)](randn(16), torch.zeros(2), 11, 16)
    source = ASTSource(
        fn=masked_sum_kernel,
        signature={"a": "*bf16", "c": "*fp32", "n": "i32", "N": "constexpr"},
        constexprs={"N": 16},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 1})
    assert ".entry masked_sum_kernel" in compiled.asm["ptx"]
