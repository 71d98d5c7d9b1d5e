"""backend="triton" on CPU tensors: the real backend object, its launches run by the interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from recurx.backends import triton as backend
from recurx.bench.host import TRITON_KINDS as KINDS
from recurx.bench.host import simulated
from recurx.plan import DEVICES


@contextlib.contextmanager
def triton_on_cpu(
    *kinds: str, slice: int | None = None, capture: Callable | None = None
) -> Iterator[object]:
    """`recurx.recurse(..., backend="triton")` works on CPU tensors inside; yields the backend.

    `kinds` of plan and samples of a `slice` are left to the plans unless they are given.
    Nothing is remembered from before or after: no weights, no recordings.
    """
    from bf16_interpreter import interpreting

    backend.BACKEND.free()
    chosen = {"kinds": kinds or KINDS, "slice": slice, "capture": capture}
    with interpreting(), simulated(DEVICES["a100"], **chosen):
        try:
            yield backend.BACKEND
        finally:
            backend.BACKEND.free()


class FakeGraphs:
    """Stands for CUDA graphs: capturing notes the launches without running them, replay runs them.

    `captures` and `replays` count; a torch operation that is neither a view nor a product into
    memory that is there fails the capture, because on a GPU it would allocate or be forgotten.
    Where `allocates`, new memory may be asked for too: that of the graph's own pool.
    """

    def __init__(self, allocates: bool = False) -> None:
        self._allowed = (*VIEWS, *(ALLOCATE if allocates else ()))
        self.captures = self.replays = 0
        self.launches = 0  # of the last capture

    def __call__(self, launch: Callable[[], None]) -> Callable[[], None]:
        from triton.runtime.jit import JITFunction

        noted: list[tuple] = []

        def note(kernel, *arguments, **keywords):
            noted.append((kernel, arguments, keywords))

        run = JITFunction.run
        with mock.patch.object(JITFunction, "run", note), _noting_products(noted, self._allowed):
            launch()
        self.captures += 1
        self.launches = len(noted)

        def replay() -> None:
            self.replays += 1
            for kernel, arguments, keywords in noted:
                if isinstance(kernel, JITFunction):
                    run(kernel, *arguments, **keywords)
                else:
                    kernel(*arguments, **keywords)

        return replay


VIEWS = (
    "slice", "select", "view", "transpose", "unsqueeze", "as_strided", "alias", "detach",
    "t", "expand", "_unsafe_view", "narrow",
)  # fmt: skip
ALLOCATE = ("empty", "new_empty", "empty_like")


def _noting_products(
    noted: list[tuple], allowed: tuple[str, ...]
) -> contextlib.AbstractContextManager:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.out, torch.ops.aten.bmm.out, torch.ops.aten.addmm.out):
                noted.append((func, args, kwargs))
                return kwargs["out"]
            name = func.overloadpacket.__name__
            assert name in allowed, f"{name} while a graph is captured"
            return func(*args, **(kwargs or {}))

    return Noting()
