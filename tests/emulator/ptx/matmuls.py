"""Triton matmuls in many layouts, from their PTX: a check of the emulator by proven code.

Triton's code generator runs on hardware every day. If its PTX gives right products here, then the
emulator and the hardware agree on the fragments, descriptors, swizzles and transposes it uses.

    python -m emulator.ptx.matmuls           # all: 7 shapes, A and B transposed or not, two
    python -m emulator.ptx.matmuls 90        # generations; or one of them
"""

from __future__ import annotations

import itertools
import re
import sys
import time
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from aot.triton_compile import compile_kernel

from ..build import EmulatorFault
from .run import PtxKernel

STEPS = 3  # more than the pipeline is deep would be slow; fewer would not reuse a stage


@triton.jit
def matmul(
    a, b, c,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    A_T: tl.constexpr, B_T: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    k = tl.arange(0, K)
    acc = tl.zeros((M, N), tl.float32)
    for step in range(STEPS):
        if A_T:
            left = tl.trans(tl.load(a + step * M * K + k[:, None] * M + m[None, :]))
        else:
            left = tl.load(a + step * M * K + m[:, None] * K + k[None, :])
        if B_T:
            right = tl.trans(tl.load(b + step * N * K + n[:, None] * K + k[None, :]))
        else:
            right = tl.load(b + step * N * K + k[:, None] * N + n[None, :])
        acc = tl.dot(left, right, acc)
    tl.store(c + m[:, None] * N + n[None, :], acc)


@dataclass(frozen=True)
class Layout:
    arch: str
    m: int
    n: int
    k: int
    a_transposed: bool
    b_transposed: bool
    warps: int

    def __str__(self) -> str:
        a, b = ("A^T" if self.a_transposed else "A"), ("B^T" if self.b_transposed else "B")
        return f"sm_{self.arch} {self.m}x{self.n}x{self.k} {a} {b} {self.warps} warps"


SHAPES = ((64, 16, 16), (64, 32, 32), (64, 64, 64), (128, 128, 64))
SHAPES += ((64, 256, 32), (128, 64, 128), (64, 128, 16))


def layouts() -> list[Layout]:
    found = []
    for arch, shape in itertools.product(("90", "80"), SHAPES):
        for a, b in itertools.product((False, True), repeat=2):
            found.append(Layout(arch, *shape, a, b, 4))
            if shape[:2] == (128, 128):
                found.append(Layout(arch, *shape, a, b, 8))
    return found


def compiled(layout: Layout):
    constants = {"M": layout.m, "N": layout.n, "K": layout.k, "STEPS": STEPS}
    constants |= {"A_T": layout.a_transposed, "B_T": layout.b_transposed}
    operands = [torch.empty(0, dtype=torch.bfloat16), torch.empty(0, dtype=torch.bfloat16)]
    options = {"num_warps": layout.warps, "num_stages": 3, "enable_fp_fusion": True}
    return compile_kernel(matmul, (*operands, torch.empty(0)), constants, options, layout.arch)


def check(layout: Layout, seed: int = 1) -> str:
    """'right', or what is wrong; with the race checker on."""
    made = compiled(layout)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(STEPS, layout.m, layout.k, generator=generator).bfloat16()
    b = torch.randn(STEPS, layout.k, layout.n, generator=generator).bfloat16()
    want = (a.double() @ b.double()).sum(0)
    a_stored = (a.mT if layout.a_transposed else a).contiguous()
    b_stored = (b.mT if layout.b_transposed else b).contiguous()
    got = torch.full((layout.m, layout.n), float("nan"))
    kernel = PtxKernel(made.ptx)
    kernel.configure(seed=seed, race=1)
    try:
        kernel.launch((1,), (layout.warps * 32,), [a_stored, b_stored, got], made.shared)
    except EmulatorFault as fault:
        return str(fault)
    wrong = ~((got.double() - want).abs() < 1e-3)
    return f"{int(wrong.sum())} of {wrong.numel()} products are wrong" if wrong.any() else "right"


def instructions(ptx: str) -> str:
    """Which tensor-core instruction the PTX holds, and how its operands lie."""
    found = re.search(r"wgmma\.mma_async\S*?(m64n\d+k16)\S* \{[^}]*\}, (\{?)[^;]*;", ptx)
    if not found:
        return "mma.sync" if "mma.sync" in ptx else "no product"
    kind, count = ("RS", 1) if found[2] else ("SS", 2)
    transposed = re.findall(r"\d(?=[,;])", found[0])[-count:]
    return f"wgmma {found[1]} {kind} trans {' '.join(transposed)}"


def main(arch: str = "") -> int:
    failures = 0
    for layout in layouts():
        if arch not in ("", layout.arch):
            continue
        start = time.perf_counter()
        result = check(layout)
        failures += result != "right"
        took = time.perf_counter() - start
        kind = instructions(compiled(layout).ptx)
        print(f"{layout!s:36s} {kind:28s} {took:5.1f} s  {result}", flush=True)
    print(f"{failures} failures")
    return failures


if __name__ == "__main__":
    sys.exit(bool(main(*sys.argv[1:2])))
