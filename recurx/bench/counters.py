"""What a step costs besides time: launches, memory, energy."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Dispatches(TorchDispatchMode):
    """Counts ATen operations that compute: views and queries launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        alias = returns[0].alias_info if returns else None
        self.count += not (alias is not None and not alias.is_write)
        return func(*args, **(kwargs or {}))


def launches(step: Callable[[], Any], device: str, compiled: bool) -> dict[str, Any]:
    """Launches of one step: kernels, copies and fills on a GPU; ATen operations on a CPU.

    None, with the reason, where they cannot be counted.
    """
    if device == "cuda":
        return _cuda_launches(step)
    if compiled:
        return {"launches": None, "launches_are": "not counted: a compiled step calls no operator"}
    with _Dispatches() as seen:
        step()
    return {"launches": seen.count, "launches_are": "operators dispatched, views left out"}


def _cuda_launches(step: Callable[[], Any]) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            step()
            torch.cuda.synchronize()
        events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    except RuntimeError as error:  # CUPTI is not usable in some containers
        return {"launches": None, "launches_are": f"not counted: {str(error).splitlines()[0]}"}
    if not events:
        return {"launches": None, "launches_are": "not counted: the profiler saw no kernel"}
    return {"launches": len(events), "launches_are": "kernels, copies and fills on the device"}


class Memory:
    """Peak memory from here on, above what is in use now, in MiB."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            # `ru_maxrss` starts at the parent's peak; this one can be reset.
            Path("/proc/self/clear_refs").write_text("5")
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.before = pages * mmap.PAGESIZE

    def peak(self) -> dict[str, float]:
        """`peak_mib` above the start, and `total_mib` with what was there before."""
        if self.cuda:
            total = torch.cuda.max_memory_allocated()
        else:
            status = Path("/proc/self/status").read_text()
            total = 1024 * int(status.split("VmHWM:")[1].split()[0])
        return {
            "peak_mib": round((total - self.before) / 2**20, 1),
            "total_mib": round(total / 2**20, 1),
        }


def energy(step: Callable[[], Any], device: str, seconds: float) -> dict[str, Any]:
    """Joules a step, by the GPU's own counter over about `seconds`; None without one."""
    if device != "cuda":
        return {"energy_j": None, "energy_is": "not measured: no GPU"}
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        start = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except ImportError:
        return {"energy_j": None, "energy_is": "not measured: pynvml is not installed"}
    except Exception as error:  # NVML's own errors: no permission, or a device without the counter
        return {"energy_j": None, "energy_is": f"not measured: NVML: {error}"}
    steps, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        step()
        torch.cuda.synchronize()
        steps += 1
    used = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - start  # millijoules
    return {"energy_j": used / 1e3 / steps, "energy_is": f"NVML, mean of {steps} steps"}
