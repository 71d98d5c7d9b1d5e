"""Whole kernels from the PTX that nvcc and Triton emit, with the race checker on."""

from __future__ import annotations

import pytest

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
@pytest.mark.parametrize("label, rows", [("n=64 k=256 bf16", 70), ("_t n=97 k=512 bf16", 40)])
def test_triton_ptx(arch, label, rows):
    pytest.importorskip("triton")
    from . import triton_linear

    made, launch = triton_linear.prepare(label, arch, rows)
    kernel = PtxKernel(made.ptx)
    kernel.configure(race=1, seed=1)
    assert triton_linear.compare(kernel, made, launch) == "right"
