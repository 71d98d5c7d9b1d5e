"""What proves a step fit for capture without a GPU: no host in it, and a tape that replays it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# Operations whose result the host must have, or whose output's shape depends on data.
WAITS = (
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "nonzero_static", "masked_select",
    "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive",
    "repeat_interleave",
)  # fmt: skip

MASKS = (torch.bool, torch.uint8)


class HostSync(AssertionError):
    """Raised where a step would wait for the device."""


class NoHostSync(TorchDispatchMode):
    """Raises HostSync at every operation that waits; see `no_host_sync` for the rest."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITS and func.namespace == "aten":
            raise HostSync(f"{func} waits for the device")
        indexes = name in ("index", "index_put", "index_put_", "_index_put_impl_")
        if indexes and any(i is not None and i.dtype in MASKS for i in args[1]):
            raise HostSync(f"{func} with a mask waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Raise HostSync at anything that would make the host wait for a GPU.

    The dispatcher sees `.item()`, `bool()` and masks; `.tolist()`, `.numpy()` and `.cpu()` of a CPU
    tensor it does not, so these are replaced.
    """

    def refuse(name: str) -> Callable[..., None]:
        def method(self, *_, **__):
            raise HostSync(f"Tensor.{name}() waits for the device")

        return method

    names = ("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__")
    patches = {name: refuse(name) for name in names}
    with mock.patch.multiple(Tensor, **patches), NoHostSync():
        yield


def formula_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamATan2 as where no engine is: a tape sees PyTorch's operations only, as other bits."""
    monkeypatch.setattr("recurx.train.optim._engine_takes", lambda *_: False)


class Tape:
    """Stands in for CUDA graphs: records operations with their tensors, and repeats just those.

    Like a graph it repeats no Python: a number that the host formed, a branch that it took, an
    address that it chose are what they were at the recording. Unlike a graph's, its recording runs
    the step for real, so the first replay does nothing.
    """

    def __init__(self, warm_steps: int = 2) -> None:
        self.warm_steps, self.warmed, self.operations = warm_steps, 0, 0

    def warm(self, run: Callable[[], None]) -> None:
        run()
        self.warmed += 1

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        recorder = _Recorder()
        with recorder:
            run()
        self.operations = len(recorder.calls)
        calls, first = recorder.calls, [True]

        @torch.no_grad()
        def replay() -> None:
            if first:
                first.clear()
                return
            for func, args, kwargs, outputs in calls:
                again = tree_flatten(func(*args, **kwargs))[0]
                for old, new in zip(outputs, again, strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)

        return replay


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, tree_flatten(result)[0]))
        return result
