"""backend="cuda" over the owner kernel in the emulator: the real backend object, CPU tensors.

cuda = EmulatedCuda(((64, 2), (128, 3)))       # compiles these kernels alone
cuda.emulated.configure(seed=3)
out = cuda(schedule, nets, x, carry, cos_sin)  # or through recurx.recurse, see `installed`
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from recurx import Schedule, backends, reference
from recurx.backends.cuda import Cuda
from recurx.nets import Net
from recurx.plan import DEVICES, Device
from recurx.problem import Problem

from .build import KERNELS, Emulated, build

FILES = ("owner_sm80.cu", "pack_owner.cu", "runtime.cu")


class EmulatedCuda(Cuda):
    """The backend over an emulated build.

    Args:
        plans: the kernels to compile, (hidden, row tiles) each.
        checked: with the race checker; what the backend allocates is watched too.
        folder: a copy of csrc/cuda, perhaps with a bug planted.
        flags: more compiler flags, such as -DRX_TIMELINE=1.
    """

    def __init__(
        self,
        plans: tuple[tuple[int, int], ...],
        checked: bool = True,
        folder: Path = KERNELS,
        flags: tuple[str, ...] = (),
        device: Device = DEVICES["a100"],
    ) -> None:
        listed = " ".join(f"X({hidden}, {tiles})" for hidden, tiles in plans)
        flags = (*flags, f"-DRX_OWNER_PLANS(X)={listed}")
        self.emulated = Emulated(build([folder / name for name in FILES], checked, flags), checked)
        super().__init__(self.emulated.library, device, plans)

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor = super().new(shape, dtype, device)
        tensor.view(torch.uint8).fill_(0xFF)  # NaN: what nobody writes shows
        if self.emulated.checked:
            self.emulated.watch(tensor.data_ptr(), tensor.nbytes, "memory of the backend")
        return tensor

    def __call__(
        self,
        schedule: Schedule,
        nets: dict[str, Net],
        x: Tensor,
        carry: dict[str, Tensor],
        cos_sin: reference.CosSin | None = None,
        start_from: int = 0,
        stop_after: int | None = None,
    ) -> dict[str, Tensor]:
        specs = tuple((name, nets[name].spec) for name in schedule.nets)
        problem = Problem(schedule, specs, *x.shape, x.dtype, "cpu", cos_sin is not None)
        reason = self.why_unavailable() or self.why_unsupported(problem)
        assert reason is None, reason
        weights = [w for name in schedule.nets for w in nets[name].weights]
        stop = len(schedule) if stop_after is None else stop_after
        states = [carry[name] for name in schedule.states]
        try:
            out = self.run(
                problem, x, states, weights, *(cos_sin or (None, None)), start_from, stop
            )
        finally:
            self.emulated.unwatch_all()
        return dict(zip(schedule.states, out, strict=True))


@contextlib.contextmanager
def installed(cuda: Cuda) -> Iterator[None]:
    """Inside, backend="cuda" of recurx is this object."""
    real = backends.get("cuda")
    module = __import__("recurx.backends.cuda", fromlist=["BACKEND"])
    backends.get.cache_clear()
    module.BACKEND = cuda
    try:
        yield
    finally:
        module.BACKEND = real
        backends.get.cache_clear()
