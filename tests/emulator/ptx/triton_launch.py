"""Launch Triton kernels in the emulator: compiled for a GPU that is not here, run from their PTX.

with emulating("90", seed=1):
    out = linear_residual_rms(a, w, residual)      # CPU tensors; race checker on
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from triton.runtime.jit import JITFunction

from aot.triton_compile import Compiled, compile_kernel

from .run import PtxKernel


@dataclass
class TritonLaunch:
    """One launch: the compiled kernel, its grid and its runtime arguments."""

    made: Compiled
    grid: tuple[int, ...]
    arguments: list[object]

    def run(self, kernel: PtxKernel) -> None:
        """On `kernel`, which is built from this launch's PTX, or from a mutant of it."""
        kernel.launch(self.grid, (self.made.warps * 32,), self.arguments, self.made.shared)


def fences_are_there() -> bool:
    """Whether this Triton puts fence.proxy.async between cp.async and the wgmma that reads it."""
    return tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 7)


@contextlib.contextmanager
def _launching(arch: str, use: Callable[[TritonLaunch], None]) -> Iterator[None]:
    def launch(self, *arguments, grid, warmup=False, **keywords):
        constants = {name: keywords.pop(name) for name in self.arg_names if name in keywords}
        made = compile_kernel(self, arguments, constants, keywords, arch)
        use(TritonLaunch(made, grid, [a for a in arguments if a is not None]))

    with mock.patch.object(JITFunction, "run", launch):
        yield


@contextlib.contextmanager
def emulating(arch: str, watch: Sequence[torch.Tensor] = (), **settings: float) -> Iterator[None]:
    """Triton kernels launched inside run in the emulator, with the race checker on.

    `watch`: tensors in global memory that are checked too, where threads of a block hand over data
    through them. (Shared memory always is.) What different blocks do to them is not compared.

    Triton 3.6 leaves out fence.proxy.async (test_fences.py); there all but that is checked.
    """

    def run(launch: TritonLaunch) -> None:
        kernel = PtxKernel(launch.made.ptx)
        fixed = {"race": 1, "seed": 1, "copies_may_write": 1, "proxies": int(fences_are_there())}
        kernel.configure(**fixed | settings)
        for number, tensor in enumerate(watch):
            kernel.library.watch(tensor.data_ptr(), tensor.nbytes, f"watched {number}")
        try:
            launch.run(kernel)
        finally:
            kernel.library.unwatch_all()

    with _launching(arch, run):
        yield


def captured(arch: str, call: Callable[[], object]) -> list[TritonLaunch]:
    """The launches that `call` makes; none of them is run."""
    launches: list[TritonLaunch] = []
    with _launching(arch, launches.append):
        call()
    return launches
