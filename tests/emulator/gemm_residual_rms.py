"""Drive the two GEMM + residual + rms kernels of fixtures/ in the emulator and compare with numpy.

Runs without torch, so that a test can start it as a fresh process for every planted bug:

    python -m emulator.gemm_residual_rms sm80 --m 97 --n 512 --k 128 --seeds 10
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .build import FIXTURES, KERNELS, Emulated, EmulatorFault, build

FILES = {
    "sm80": ["gemm_residual_rms_sm80.cu"],
    "sm90a": ["gemm_residual_rms_sm90a.cu", "pack_tape.cu"],
}
EPS = 1e-5
GUARD_ROWS = 256  # more than a row block


class Params(ctypes.Structure):
    """RxGemmResidualRms of fixtures/gemm_residual_rms.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "w", "residual", "out")),
        *((name, ctypes.c_int) for name in ("m", "n", "k")),
        ("eps", ctypes.c_float),
    ]


def kernels(kernel: str, folder: Path = FIXTURES) -> list[Path]:
    """Its files: the first may come from a mutated copy (`copy_sources`)."""
    first, *others = FILES[kernel]
    return [folder / first, *(FIXTURES / name for name in others)]


def load(kernel: str, checked: bool, folder: Path = FIXTURES) -> Emulated:
    sources = [*kernels(kernel, folder), KERNELS / "runtime.cu"]
    return Emulated(build(sources, checked), checked)


def copy_sources(folder: Path) -> None:
    """The fixtures and what they include of csrc/cuda, to be mutated."""
    for source in (KERNELS, FIXTURES):
        shutil.copytree(source, folder, dirs_exist_ok=True)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even; the bits as uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


def aligned(shape: tuple[int, ...], alignment: int = 1024) -> np.ndarray:
    """A uint16 array at an aligned address, as device allocations are."""
    raw = np.empty(int(np.prod(shape)) + alignment, np.uint16)
    offset = -raw.ctypes.data % alignment // 2
    return raw[offset : offset + int(np.prod(shape))].reshape(shape)


@dataclass
class Case:
    m: int
    n: int
    k: int
    cluster_rows: int = 1

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.m * 7919 + self.n * 31 + self.k)
        self.a = aligned((self.m, self.k))
        self.w = aligned((self.n, self.k))
        self.residual = aligned((self.m, self.n))
        self.a[:] = to_bf16(rng.standard_normal(self.a.shape))
        self.w[:] = to_bf16(rng.standard_normal(self.w.shape) / self.k**0.5)
        self.residual[:] = to_bf16(rng.standard_normal(self.residual.shape))
        x = from_bf16(self.residual).astype(np.float64)
        x += from_bf16(self.a).astype(np.float64) @ from_bf16(self.w).astype(np.float64).T
        self.want = x / np.sqrt((x * x).mean(1, keepdims=True) + EPS)

    def run(self, lib: Emulated, kernel: str) -> np.ndarray:
        """The kernel's output, bf16 bits; raises EmulatorFault."""
        guarded = aligned((self.m + GUARD_ROWS, self.n))
        guarded[:] = 0x7FFF  # NaN: an element that nobody writes shows, and so does a guard
        out = guarded[: self.m]
        arguments, keep = self.params(lib, kernel, out)
        lib.call(f"rx_gemm_residual_rms_{kernel}", *arguments)
        del keep
        if (guarded[self.m :] != 0x7FFF).any():
            raise EmulatorFault("rows beyond m were written")
        return out

    def params(
        self, lib: Emulated, kernel: str, out: np.ndarray
    ) -> tuple[tuple[object, ...], object]:
        """The arguments of the C entry, and what must stay alive during the call."""
        w = self.w
        if kernel == "sm90a":
            w = aligned((self.n, self.k))
            lib.call("rx_pack_tape_sm90a", pointer(self.w), pointer(w), self.n, self.k, None)
        params = Params(
            *(x.ctypes.data for x in (self.a, w, self.residual, out)), self.m, self.n, self.k, EPS
        )
        extra = (self.cluster_rows,) if kernel == "sm90a" else ()
        return (ctypes.byref(params), *extra, None), (params, w)

    def compare(self, out: np.ndarray) -> str | None:
        """None, or the first wrong element: one bf16 rounding and the order of sums are allowed."""
        got = from_bf16(out)
        wrong = ~(np.abs(got - self.want) <= 2**-8 * np.abs(self.want) + 1e-4)
        if not wrong.any():
            return None
        r, c = np.argwhere(wrong)[0]
        return (
            f"{wrong.sum()} of {wrong.size} elements are wrong; the first at row {r} column {c}: "
            f"got {got[r, c]:.6f}, expected {self.want[r, c]:.6f}"
        )

    @property
    def flop(self) -> int:
        return 2 * self.m * self.n * self.k


def pointer(x: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


def outcome(lib: Emulated, case: Case, kernel: str, **settings: float) -> str:
    """'right', or what was found."""
    lib.configure(**settings)
    try:
        return case.compare(case.run(lib, kernel)) or "right"
    except EmulatorFault as fault:
        return str(fault)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernel", choices=FILES)
    for name, default in (("m", 97), ("n", 512), ("k", 128), ("cluster-rows", 1), ("seeds", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, default=FIXTURES, help="a copy of them")
    parser.add_argument("--plain", action="store_true", help="no race checker")
    parser.add_argument(
        "--in-order", action="store_true", help="no random scheduling, eager copies"
    )
    parser.add_argument("--json", action="store_true", help="one line: the list of outcomes")
    args = parser.parse_args()
    lib = load(args.kernel, not args.plain, args.folder)
    if args.in_order:
        lib.configure(**{"random_order": 0, "async": 0})
    case = Case(args.m, args.n, args.k, args.cluster_rows)
    outcomes = []
    for seed in range(1, args.seeds + 1):
        start = time.perf_counter()
        outcomes.append(outcome(lib, case, args.kernel, seed=seed))
        took = time.perf_counter() - start
        if not args.json:
            print(
                f"seed {seed}: {took:.2f} s, {case.flop / took * 1e-9:.2f} GFLOP/s: {outcomes[-1]}"
            )
    if args.json:
        print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
