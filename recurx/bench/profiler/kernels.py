"""CUDA: kernels of one traced step, tied to the operators that launched them, and command lines
for NVIDIA's tools, aimed at the kernel that costs most.

The tracer marks every operator with a `record_function` range; torch.profiler lists, for each CPU
event, the kernels it launched, and the ranges around it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from recurx.bench.profiler.records import Op
from recurx.bench.profiler.tracer import MARK

STEP = "recurx::step"
# Names of recurx's own kernels start so; without a CUDA profile they are what one looks for.
OWN_KERNELS = "rx_|recurx|_kernel"


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


def commands(
    script: str, kernels: Iterable[tuple[str, float, float]], stage_of_top: str = ""
) -> list[str]:
    """Ready nsys and ncu lines.

    Args:
        script: what to run, e.g. "python -m recurx profile --preset trm-att --nvtx".
        kernels: (name, start us, us) of a CUDA profile; empty on a CPU.
        stage_of_top: stage that the costliest kernel belongs to.
    """
    total: dict[str, float] = defaultdict(float)
    for name, _, us in kernels:
        total[name] += us
    lines = [
        "# steps inside `with recurx.bench.profiler.nvtx_ranges(model):`, by call, block, stage:",
        f"nsys profile -t cuda,nvtx -c cudaProfilerApi -o recurx {script}",
        "nsys stats -r cuda_gpu_kern_sum,nvtx_gpu_proj_sum recurx.nsys-rep",
    ]
    if total:
        top = max(total, key=lambda name: total[name])
        pattern = re.escape(re.split(r"[<(]", top)[0].rpartition("::")[2].split()[-1])
        where = f", stage {stage_of_top}" if stage_of_top else ""
        lines.append(f"# the costliest kernel ({total[top] / 1e3:.4g} ms a step{where}):")
    else:
        pattern = OWN_KERNELS
        lines.append("# one kernel in depth (this profile ran on a CPU; on a GPU it names one):")
    lines.append(
        f'ncu --set full --import-source yes -k "regex:{pattern}" --launch-skip 3 '
        f"--launch-count 1 -o recurx-kernel {script}"
    )
    return lines
