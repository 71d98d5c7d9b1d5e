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


UNITS = 132  # multiprocessors: tiles follow from them and from the shape


def _linear(what: str, m: int, k: int, n: int, over_tokens: bool = False) -> Maker:
    """A use of kernels/linear.py on raw rows, or over tokens on normalised ones; m rows."""

    def kernel():
        from recurx.kernels.linear import linear_kernel

        return linear_kernel

    def launch(dtype: torch.dtype, shared: int):
        from recurx.kernels import tiles
        from recurx.kernels.linear import launch_arguments

        def rows(columns: int) -> torch.Tensor:
            if over_tokens:
                return _meta(2, columns, m, dtype=dtype).mT
            return _meta(m, columns, dtype=dtype)

        chip = tiles.Chip(shared, UNITS)
        a, w, out = rows(k), _meta(n, k, dtype=dtype), rows(n)
        tile = tiles.product_tile(m, n, n, dtype.itemsize, chip)
        sums = _meta(-(-n // (2 * tile.cols)), m, dtype=torch.float32)
        more: dict = {"squares": _meta(2, m, dtype=torch.float32), "eps": 1e-5}
        if what == "gate_up":
            w = _meta(2 * n, k, dtype=dtype)
            more = {} if over_tokens else more
            more |= {"swiglu": True}
        elif what == "residual":
            more |= {"residual": out, "kept": sums, "norm": "sums"}
        elif what == "rows":
            a = _meta(2, m, k, dtype=dtype)
            more = {"residual": out, "norm": "rows", "eps": 1e-5}
        elif what == "dgrad":
            a = _meta(*out.shape[:-1], k, dtype=dtype)
            w, more = _meta(k, n, dtype=dtype).T, {"residual": out}
        return launch_arguments(a, w, out, chip, **more)

    name = "linear " + what + ("_t" if over_tokens else "")
    return f"{name} m={m} n={n} k={k}", kernel, launch


def _normalise(batch: int, tokens: int, d: int) -> Maker:
    def kernel():
        from recurx.kernels.rms import normalise_kernel

        return normalise_kernel

    def launch(dtype: torch.dtype, shared: int):
        from recurx.kernels.rms import launch_arguments

        squares, scale = (_meta(n, batch * tokens, dtype=torch.float32) for n in (2, 1))
        return launch_arguments(_meta(batch * tokens, d, dtype=dtype), squares, scale, 1e-5)

    return f"normalise t={tokens} d={d}", kernel, launch


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


# What TRM-att and TRM-mlp Sudoku launch; compiled for every generation (`_each`).
MAIN = (
    _linear("linear", 97 * 64, 512, 1536),
    _linear("residual", 97 * 64, 1536, 512),
    _linear("gate_up", 97 * 64, 512, 1536),
    _linear("rows", 512, 512, 97, over_tokens=True),
    _attention(64, 97, 8, 64),
    _attention(64, 97, 8, 64, rotate=False),
)
# The tiles of few rows (B = 1, 8), a wide and a small net, the first product of the token-MLP, the
# longest and a small attention.
MORE = (
    _linear("residual", 97, 1536, 512),
    _linear("residual", 97 * 8, 1536, 512),
    _linear("gate_up", 97 * 8, 512, 1536),
    _linear("residual", 97 * 32, 768, 768),
    _linear("residual", 17 * 64, 256, 64),
    _linear("gate_up", 512, 97, 512, over_tokens=True),
    _linear("gate_up", 512 * 64, 97, 512, over_tokens=True),
    _linear("rows", 512, 512, 916, over_tokens=True),
    _normalise(64, 97, 512),
    _attention(64, 916, 8, 64),
    _attention(64, 916, 8, 64, rotate=False),
    _attention(2, 40, 2, 128),
    _attention(2, 128, 2, 128),
    _attention(2, 300, 2, 128),
)
GENERATIONS = ("80", "90")  # mma.sync and wgmma: they stand for the others


def _each(number: int) -> tuple[str, ...]:
    """Both, tcgen05, and in turn one of the two that have mma.sync and 99 KB of shared memory."""
    return (*GENERATIONS, "100", ("89", "120")[number % 2])


def cases(thorough: bool = False) -> Iterator[TritonCase]:
    """bf16 for every generation and fp32 for one; `thorough` leaves nothing out."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for number, maker in enumerate(MAIN):
        yield _case(maker, bf16, ARCHS if thorough else _each(number))
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
