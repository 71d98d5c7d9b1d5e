"""Launch Triton kernels in the emulator: compiled for a GPU that is not here, run from their PTX.

with emulating("90", seed=1):
    out = linear_residual_rms(a, w, residual)      # CPU tensors; race checker on
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

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


@contextlib.contextmanager
def _launching(arch: str, use: Callable[[TritonLaunch], None]) -> Iterator[None]:
    def launch(self, *arguments, grid, warmup=False, **keywords):
        constants = {name: keywords.pop(name) for name in self.arg_names if name in keywords}
        made = compile_kernel(self, arguments, constants, keywords, arch)
        use(TritonLaunch(made, grid, list(arguments)))

    with mock.patch.object(JITFunction, "run", launch):
        yield


@contextlib.contextmanager
def emulating(arch: str, **settings: float) -> Iterator[None]:
    """Triton kernels launched inside run in the emulator, with the race checker on."""

    def run(launch: TritonLaunch) -> None:
        kernel = PtxKernel(launch.made.ptx)
        kernel.configure(**{"race": 1, "seed": 1} | settings)
        launch.run(kernel)

    with _launching(arch, run):
        yield


def captured(arch: str, call: Callable[[], object]) -> list[TritonLaunch]:
    """The launches that `call` makes; none of them is run."""
    launches: list[TritonLaunch] = []
    with _launching(arch, launches.append):
        call()
    return launches
