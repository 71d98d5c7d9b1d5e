"""Run kernels/linear_residual_rms.py from its PTX in the emulator and compare with fp64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from aot import triton_cases
from aot.triton_compile import Compiled

from .run import PtxKernel


@dataclass
class Launch:
    """Tensors for the strides that are compiled in, of which the first `rows` rows are used."""

    a: torch.Tensor
    w: torch.Tensor
    residual: torch.Tensor
    transposed: bool  # rows are columns of a [T, D] state, as in the token-MLP
    rows: int
    programs: int


def prepare(label: str, arch: str, rows: int) -> tuple[Compiled, Launch]:
    """The compiled case of aot/triton_cases.py whose label contains `label`."""
    case = next(c for c in triton_cases.cases() if label in c.label)
    _, constants, _ = case.launch(case.dtype, triton_cases.SHARED_LIMIT[arch])
    n, k = constants["N"], constants["K"]
    transposed = constants["R_COL"] != 1
    stored = constants["R"] if transposed else rows
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(stored, k, generator=generator).to(case.dtype)
    w = (torch.randn(n, k, generator=generator) * k**-0.5).to(case.dtype)
    residual = torch.randn(stored, n, generator=generator).to(case.dtype)
    programs = -(-rows // constants["ROWS"])
    return case.compile(arch), Launch(a, w, residual, transposed, rows, programs)


def compare(kernel: PtxKernel, made: Compiled, launch: Launch) -> str:
    """'right', or how many elements are wrong; raises EmulatorFault."""
    residual = launch.residual.T.contiguous() if launch.transposed else launch.residual
    out = torch.full_like(residual, float("nan"))
    kernel.launch(
        (launch.programs,),
        (made.warps * 32,),
        [launch.a, launch.w, residual, out, launch.rows],
        made.shared,
    )
    got = (out.T if launch.transposed else out)[: launch.rows].double()
    x = launch.residual.double() + launch.a.double() @ launch.w.double().T
    want = (x * torch.rsqrt((x * x).mean(1, keepdim=True) + 1e-5))[: launch.rows]
    wrong = ~((got - want).abs() <= 2**-8 * want.abs() + 1e-3)
    return f"{int(wrong.sum())} of {wrong.numel()} are wrong" if wrong.any() else "right"
