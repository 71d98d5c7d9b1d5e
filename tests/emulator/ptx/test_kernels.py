"""Whole kernels from the PTX that nvcc and Triton emit, with the race checker on."""

from __future__ import annotations

import pytest
import torch

from .. import build
from .. import gemm_residual_rms as gemm

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
from aot import toolchain  # noqa: E402

from .run import PtxKernel, load_ptx  # noqa: E402

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
    files = gemm.FILES[kernel]
    texts = [
        toolchain.nvcc_compile(build.KERNELS / name, arch, to="ptx").cubin.read_text()
        for name in files
        if name != "runtime.cu"
    ]
    library = load_ptx(texts, files, wanted=template)
    for seed in (1, 2):
        assert gemm.outcome(library, case, kernel, race=1, seed=seed) == "right"
    assert library.stat("flop") > 0, "the C++ ran in the place of the PTX"


@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize("label, m", [("n=64 k=256 bf16", 70), ("_t n=97 k=512 bf16", 2 * 20)])
def test_triton_linear_residual_rms(arch, label, m):
    pytest.importorskip("triton")
    from aot import triton_cases

    case = next(c for c in triton_cases.cases() if label in c.label)
    made = case.compile(arch)
    _, constants, _ = case.launch(case.dtype, triton_cases.SHARED_LIMIT[arch])
    n, k, per_sample = constants["N"], constants["K"], constants["R"]
    generator = torch.Generator().manual_seed(0)
    transposed = constants["R_COL"] != 1
    # The strides are compiled in: a token-MLP sample has its full width, of which m rows are used.
    rows = per_sample if transposed else m
    a = torch.randn(rows, k, generator=generator).bfloat16()
    w = (torch.randn(n, k, generator=generator) * k**-0.5).bfloat16()
    residual = torch.randn(rows, n, generator=generator).bfloat16()
    stored = residual.T.contiguous() if transposed else residual
    out = torch.full_like(stored, float("nan"))
    kernel = PtxKernel(made.ptx)
    kernel.configure(race=1, seed=1)
    programs = -(-m // constants["ROWS"])
    kernel.launch((programs,), (made.warps * 32,), [a, w, stored, out, m], made.shared)
    got = (out.T if transposed else out)[:m].double()
    x = a[:m].double() @ w.double().T + residual[:m].double()
    want = x * torch.rsqrt((x * x).mean(1, keepdim=True) + 1e-5)
    torch.testing.assert_close(got, want, rtol=2**-8, atol=1e-3)
