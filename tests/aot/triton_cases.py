"""Every Triton kernel with the configurations it is compiled in, without a GPU.

A case is built by the kernel's own `launch_arguments`, on `meta` tensors of a shape that matters,
so that what is inspected is what would be launched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from aot.resources import SHARED_LIMIT, TENSOR_KINDS, Need
from aot.triton_compile import Compiled, compile_kernel

ARCHS = ("80", "89", "90", "100", "120")
Launch = tuple[tuple, dict, dict]  # arguments, constants, compiler options
Maker = tuple[str, Callable[[], object], Callable[[torch.dtype, int], Launch]]


@dataclass(frozen=True)
class TritonCase:
    label: str
    dtype: torch.dtype
    archs: tuple[str, ...]
    kernel: Callable[[], object]  # imports triton only when asked
    launch: Callable[[torch.dtype, int], Launch]  # for a dtype and so much shared memory

    def need(self, arch: str) -> Need:
        """bf16 products are meant for the tensor cores, on sm_90 for wgmma; fp32 ones are not.

        wgmma takes 64 rows; a tile of fewer (wide rows, few registers) is mma.sync there too.
        """
        if self.dtype == torch.float32:
            return Need(tensor=())
        _, constants, _ = self.launch(self.dtype, SHARED_LIMIT[arch])
        wide_enough = constants["ROWS"] >= 64
        return Need(tensor=("HGMMA",) if arch == "90" and wide_enough else TENSOR_KINDS)

    def compile(self, arch: str) -> Compiled:
        return compile_kernel(self.kernel(), *self.launch(self.dtype, SHARED_LIMIT[arch]), arch)


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def _linear_residual_rms(m: int, k: int, n: int, transposed: bool = False) -> Maker:
    def kernel():
        from recurx.kernels.linear_residual_rms import linear_residual_rms_kernel

        return linear_residual_rms_kernel

    def launch(dtype: torch.dtype, shared: int):
        from recurx.kernels.linear_residual_rms import launch_arguments

        residual = _meta(2, n, m, dtype=dtype).mT if transposed else _meta(m, n, dtype=dtype)
        a = _meta(*residual.shape[:-1], k, dtype=dtype)
        return launch_arguments(a, _meta(n, k, dtype=dtype), residual, residual, 1e-5, shared)

    name = "linear_residual_rms" + ("_t" if transposed else "")
    return f"{name} n={n} k={k}", kernel, launch


# The O and down products of TRM-att, the widest and a small net, the token-MLP's second product.
MAKERS = (
    _linear_residual_rms(97 * 64, 1536, 512),
    _linear_residual_rms(97 * 64, 768, 768),
    _linear_residual_rms(17 * 64, 256, 64),
    _linear_residual_rms(512, 512, 97, transposed=True),
)
FP32_ARCHS = ("80", "90")  # ordinary multiply-adds: two generations stand for all


def cases() -> Iterator[TritonCase]:
    for label, kernel, launch in MAKERS:
        for dtype, archs in ((torch.bfloat16, ARCHS), (torch.float32, FP32_ARCHS)):
            yield TritonCase(f"{label} {_short(dtype)}", dtype, archs, kernel, launch)
