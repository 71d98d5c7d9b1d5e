"""The emulator's GEMM kernels on the hardware, with the cases and the judgement of its tests."""

from __future__ import annotations

import ctypes

import pytest
import torch
from nvcc_library import KERNELS, call, library, pointer, runs_here

from aot import toolchain
from emulator import gemm_residual_rms as gemm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(toolchain.find_nvcc() is None, reason="nvcc is not here"),
]
ARCHS = {"sm80": "80", "sm90a": "90a"}
GUARD_ROWS = 256
CASES = [
    ("sm80", gemm.Case(97, 512, 512)),
    ("sm80", gemm.Case(43, 128, 320)),
    ("sm90a", gemm.Case(97, 512, 512, 1)),
    ("sm90a", gemm.Case(200, 128, 832, 2)),
    ("sm90a", gemm.Case(1, 256, 64, 2)),
]


def on_device(array) -> torch.Tensor:
    """The bits of bf16 values, as 16-bit integers on the device."""
    return torch.from_numpy(array.view("int16").copy()).cuda()


def run(kernel: str, case: gemm.Case) -> torch.Tensor:
    lib = library([*gemm.kernels(kernel), KERNELS / "runtime.cu"], ARCHS[kernel])
    a, w, residual = (on_device(x) for x in (case.a, case.w, case.residual))
    guarded = torch.full((case.m + GUARD_ROWS, case.n), 0x7FFF, dtype=torch.int16, device="cuda")
    extra = []
    if kernel == "sm90a":
        tape = torch.empty_like(w)
        call(lib, "rx_pack_tape_sm90a", pointer(w), pointer(tape), case.n, case.k, None)
        w, extra = tape, [case.cluster_rows]
    tensors = [t.data_ptr() for t in (a, w, residual, guarded)]
    params = gemm.Params(*tensors, case.m, case.n, case.k, gemm.EPS)
    call(lib, f"rx_gemm_residual_rms_{kernel}", ctypes.byref(params), *extra, None)
    assert (guarded[case.m :] == 0x7FFF).all(), "rows beyond m were written"
    return guarded[: case.m]


@pytest.mark.parametrize("kernel, case", CASES, ids=str)
def test_right_and_bit_equal_when_run_again(kernel, case):
    if not runs_here(ARCHS[kernel]):
        pytest.skip(f"sm_{ARCHS[kernel]} code does not run on this device")
    first = run(kernel, case)
    assert case.compare(first.cpu().numpy().view("uint16")) is None
    assert torch.equal(first, run(kernel, case))
