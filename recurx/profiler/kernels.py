"""CUDA: kernels of one traced step, tied to the operators that launched them.

The tracer marks every operator with a `record_function` range; torch.profiler lists, for each CPU
event, the kernels it launched, and the ranges around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from recurx.profiler.records import Op
from recurx.profiler.tracer import MARK

STEP = "recurx::step"


def record(run: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """Run under torch.profiler with CUDA; the result, and the profiler's events."""
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        with record_function(STEP):
            out = run()
        torch.cuda.synchronize()
    return out, list(profiler.events())


def attach(events: Iterable[Any], ops: Sequence[Op]) -> list[tuple[str, float, float]]:
    """Give each operator its kernels; returns (name, start us, us) of all kernels of the step.

    `events` are torch.profiler's `FunctionEvent`s. Kernels that no operator of PyTorch launched (an
    extension that is called directly) are in the returned list only.
    """
    events = list(events)
    origin = next((e.time_range.start for e in events if e.name == STEP), 0.0)
    for event in events:
        if not getattr(event, "kernels", None):
            continue
        index = _marked(event)
        if index is not None and index < len(ops):
            ops[index].kernels += [(kernel.name, kernel.duration) for kernel in event.kernels]
    return sorted(
        (
            (e.name, e.time_range.start - origin, e.time_range.end - e.time_range.start)
            for e in events
            if _on_device(e)
        ),
        key=lambda kernel: kernel[1],
    )


def _marked(event: Any) -> int | None:
    """Number of the operator whose range encloses a CPU event."""
    while event is not None:
        if event.name.startswith(MARK):
            return int(event.name.removeprefix(MARK))
        event = event.cpu_parent
    return None


def _on_device(event: Any) -> bool:
    # Ranges appear on the device too, as annotations; they are no kernels.
    return "CUDA" in str(event.device_type) and not event.name.startswith((MARK, STEP))
