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
    spills: int = 0  # see resources.Need
    products: bool = True  # whether it is meant for the tensor cores

    def need(self, arch: str) -> Need:
        """bf16 products are meant for the tensor cores, on sm_90 for wgmma; fp32 ones are not.

        wgmma takes 64 rows; a tile of fewer (wide rows, few registers) is mma.sync there too.
        """
        if self.dtype == torch.float32 or not self.products:
            return Need(tensor=(), max_spills=self.spills)
        _, constants, options = self.launch(self.dtype, SHARED_LIMIT[arch])
        if "PRECISION" not in constants:  # a kernel without products
            return Need(tensor=())
        wide_enough = constants["ROWS"] >= 64 and options["num_warps"] >= 4
        tensor = ("HGMMA",) if arch == "90" and wide_enough else TENSOR_KINDS
        return Need(tensor=tensor, max_spills=self.spills)

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


def _gate_up_swiglu(m: int, k: int, f: int, transposed: bool = False) -> Maker:
    def kernel():
        from recurx.kernels.gate_up_swiglu import gate_up_swiglu_kernel

        return gate_up_swiglu_kernel

    def launch(dtype: torch.dtype, shared: int):
        from recurx.kernels.gate_up_swiglu import launch_arguments

        x = _meta(2, k, m, dtype=dtype).mT if transposed else _meta(m, k, dtype=dtype)
        out = _meta(*x.shape[:-1], f, dtype=dtype)
        return launch_arguments(x, _meta(2 * f, k, dtype=dtype), out, shared)

    return f"gate_up_swiglu{'_t' if transposed else ''} f={f} k={k}", kernel, launch


def _qkv_rope(batch: int, tokens: int, d: int, head_dim: int) -> Maker:
    def kernel():
        from recurx.kernels.qkv_rope import qkv_rope_kernel

        return qkv_rope_kernel

    def launch(dtype: torch.dtype, shared: int):
        from recurx.kernels.qkv_rope import launch_arguments

        x, w = _meta(batch, tokens, d, dtype=dtype), _meta(3 * d, d, dtype=dtype)
        table = _meta(tokens, head_dim, dtype=torch.float32)
        out = _meta(batch, tokens, 3 * d // head_dim, head_dim, dtype=dtype)
        return launch_arguments(x, w, head_dim, (table, table), out, shared)

    return f"qkv_rope t={tokens} d={d} head={head_dim}", kernel, launch


def _attention(batch: int, tokens: int, heads: int, head_dim: int, rotate: bool = True) -> Maker:
    def kernel():
        from recurx.kernels.attention import attention_kernel

        return attention_kernel

    def launch(dtype: torch.dtype, shared: int):
        from recurx.kernels.attention import launch_arguments

        qkv = _meta(batch, tokens, 3 * heads, head_dim, dtype=dtype)
        out = _meta(batch, tokens, heads, head_dim, dtype=dtype)
        lse = _meta(batch, heads, tokens, dtype=torch.float32)
        table = _meta(tokens, head_dim, dtype=torch.float32)
        return launch_arguments(qkv, out, shared, lse, (table, table) if rotate else None)

    name = "attention" + (" rotating" if rotate else "")
    return f"{name} t={tokens} head={head_dim}", kernel, launch


# What TRM-att and TRM-mlp Sudoku launch; compiled for every architecture.
MAIN = (
    _linear_residual_rms(97 * 64, 1536, 512),
    _linear_residual_rms(512, 512, 97, transposed=True),
    _gate_up_swiglu(97 * 64, 512, 1536),
    _qkv_rope(64, 97, 512, 64),
    _attention(64, 97, 8, 64),
    _attention(64, 97, 8, 64, rotate=False),
)
# The widest and a small rms, the first product of the token-MLP, the longest and a small attention.
MORE = (
    _linear_residual_rms(97 * 64, 768, 768),
    _linear_residual_rms(17 * 64, 256, 64),
    _gate_up_swiglu(512, 97, 512, transposed=True),
    _attention(64, 916, 8, 64),
    _attention(64, 916, 8, 64, rotate=False),
    _attention(2, 40, 2, 128),
    _attention(2, 128, 2, 128),
    _attention(2, 300, 2, 128),
)
GENERATIONS = ("80", "90")  # mma.sync and wgmma: they stand for the others


def cases(thorough: bool = False) -> Iterator[TritonCase]:
    """bf16 for every architecture and fp32 for one; `thorough` leaves nothing out."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for maker in MAIN:
        yield _case(maker, bf16, ARCHS)
        yield _case(maker, fp32, ARCHS if thorough else GENERATIONS[:1])
    for maker in MORE:
        yield _case(maker, bf16, ARCHS if thorough else GENERATIONS)
        if thorough:
            yield _case(maker, fp32, ARCHS)
    from aot import pointwise_cases, recursion_cases, step_cases, triton_backward_cases

    yield from recursion_cases.cases(thorough)
    yield from triton_backward_cases.cases(thorough)
    yield from step_cases.cases(ARCHS if thorough else GENERATIONS)
    yield from pointwise_cases.cases(thorough)


def _case(maker: Maker, dtype: torch.dtype, archs: tuple[str, ...]) -> TritonCase:
    label, kernel, launch = maker
    return TritonCase(f"{label} {_short(dtype)}", dtype, archs, kernel, launch)
