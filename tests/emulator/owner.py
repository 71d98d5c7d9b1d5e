"""backend="cuda" over the owner kernel in the emulator: the real backend object, CPU tensors.

cuda = emulate(((64, 2), (128, 3)))            # compiles these kernels alone
cuda.emulated.configure(seed=3)
out = cuda(schedule, nets, x, carry, cos_sin)  # or through recurx.recurse, see `installed`
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from recurx import Schedule, backends, reference
from recurx.backends.cuda import Cuda
from recurx.nets import Net
from recurx.operands import Operands, Span
from recurx.plan import DEVICES, Device
from recurx.plan.cuda_owner import Shapes
from recurx.problem import Problem

from .build import KERNELS, Emulated, build

FILES = ("owner_sm80/launch.cu", "owner_sm80/pack.cu", "runtime.cu")


class EmulatedCuda(Cuda):
    """The backend over an emulated build; what it allocates starts as NaN and is watched for races.

    Args:
        emulated: the build.
        plans: the kernels in it, (hidden, row tiles) each.
        device: what plans are made for.
    """

    def __init__(self, emulated: Emulated, plans: Shapes, device: Device) -> None:
        super().__init__(emulated.library, device, plans)
        self.emulated = emulated

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor = super().new(shape, dtype, device)
        tensor.view(torch.uint8).fill_(0xFF)
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
        seed: int | None = None,
        first_sample: int = 0,
    ) -> dict[str, Tensor]:
        """As `recurx.recurse`, without its checks."""
        specs = tuple((name, nets[name].spec) for name in schedule.nets)
        problem = Problem(schedule, specs, *x.shape, x.dtype, "cpu", cos_sin is not None)
        reason = self.why_unavailable() or self.why_unsupported(problem)
        assert reason is None, reason
        weights = [w for name in schedule.nets for w in nets[name].weights]
        stop = len(schedule) if stop_after is None else stop_after
        states = [carry[name] for name in schedule.states]
        try:
            given = None if seed is None else torch.tensor([seed, first_sample])
            operands = Operands(x, states, weights, cos_sin, given)
            out = self.run(problem, operands, Span(start_from, stop))
        finally:
            self.emulated.unwatch_all()
        return dict(zip(schedule.states, out, strict=True))


def only(plans: Shapes) -> str:
    """The compiler's flag that leaves out all other kernels."""
    each = (f"X({h}, {t}, {'kScratch' if place else 'kShared'})" for h, t, *place in plans)
    return "-DRX_OWNER_PLANS(X)=" + " ".join(each)


def emulate(
    plans: Shapes,
    checked: bool = True,
    folder: Path = KERNELS,
    flags: tuple[str, ...] = (),
    device: Device = DEVICES["a100"],
    copied: int = 1,
) -> EmulatedCuda:
    """A build of these kernels; the first `copied` of FILES may be of a copy of csrc/cuda with a
    bug."""
    sources = [(folder if n < copied else KERNELS) / name for n, name in enumerate(FILES)]
    path = build(sources, checked, (*flags, only(plans)))
    return EmulatedCuda(Emulated(path, checked), plans, device)


@contextlib.contextmanager
def installed(cuda: Cuda) -> Iterator[None]:
    """Inside, backend="cuda" of recurx is this object."""
    module = importlib.import_module("recurx.backends.cuda")
    real = module.BACKEND
    module.BACKEND = cuda
    backends.changed()
    try:
        yield
    finally:
        module.BACKEND = real
        backends.changed()
