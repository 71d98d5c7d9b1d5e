"""Facts about this machine and this copy of recurx, for `python -m recurx env` and bug reports.

Nothing here may fail: a broken part is a fact to report, so each one that can break is reported
with its error in place of its value.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from recurx.errors import how_to_compile

# /proc/cpuinfo's names of the instruction sets that the CPU engine chooses among.
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_tile", "amx_bf16")


@dataclass(frozen=True)
class Fact:
    """One line of the report; `ok` is False where something that could work does not."""

    group: str
    name: str
    value: str
    ok: bool = True


def collect() -> list[Fact]:
    """All facts, grouped and in the order of reading. Imports torch, and triton if it is there."""
    return [*_software(), *_build(), *_cpu(), *_gpu(), *_backends(), _verdicts()]


def _software() -> list[Fact]:
    import recurx

    rows = [
        Fact("software", "recurx", f"{recurx.__version__} in {Path(recurx.__file__).parent}"),
        Fact("software", "python", f"{platform.python_version()} ({platform.platform()})"),
    ]
    return rows + [_module(name) for name in ("torch", "numpy", "triton", "safetensors")]


def _module(name: str) -> Fact:
    try:
        return Fact("software", name, importlib.import_module(name).__version__)
    except Exception as error:
        return Fact("software", name, f"not usable: {type(error).__name__}: {error}", ok=False)


def _build() -> list[Fact]:
    """What the build decided (recorded by csrc/native_build.py) and whether its result loads."""
    try:
        info = importlib.import_module("recurx._build_info").INFO
        text, compiled = info["sentence"].removeprefix("recurx: "), info["compiler"] is not None
        if not compiled:
            text = f"{text.rstrip('.')}; {how_to_compile()}"
        decision = Fact("compiled module", "build", text, ok=compiled)
    except ImportError:
        text = f"not built; {how_to_compile()}"
        decision = Fact("compiled module", "build", text, ok=False)
    try:
        module = importlib.import_module("recurx._C")
    except ImportError as error:
        return [decision, Fact("compiled module", "recurx._C", f"does not load: {error}", ok=False)]
    loaded = Fact("compiled module", "recurx._C", str(module.__file__))
    try:
        usable = ", ".join(module.cpu_isas())
        used = Fact("compiled module", "CPU engine", f"uses {module.cpu_isa()}, of {usable}")
    except (RuntimeError, ValueError) as error:  # RECURX_CPU_ISA names one that this CPU lacks
        used = Fact("compiled module", "CPU engine", str(error), ok=False)
    return [decision, loaded, used]


def _cpu() -> list[Fact]:
    import torch

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    model, flags = _cpuinfo()
    return [
        Fact("cpu", "model", model),
        Fact("cpu", "cores", f"{cores}, torch uses {torch.get_num_threads()} threads"),
        Fact("cpu", "instruction sets", " ".join(f for f in CPU_FLAGS if f in flags) or "baseline"),
    ]


def _cpuinfo() -> tuple[str, frozenset[str]]:
    """Model name and feature flags as Linux lists them; empty flags elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    return fields.get("model name", platform.machine()), frozenset(fields.get("flags", "").split())


def _gpu() -> list[Fact]:
    import torch

    if not torch.backends.cuda.is_built():
        return [Fact("gpu", "devices", "none: this torch is built without CUDA")]
    if not torch.cuda.is_available():
        text = f"none usable by torch (built for CUDA {torch.version.cuda}): no device or driver"
        return [Fact("gpu", "devices", text, ok=False)]
    rows = [Fact("gpu", "CUDA of torch", str(torch.version.cuda))]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        size = f"{device.total_memory / 2**30:.0f} GiB, {device.multi_processor_count} SMs"
        rows.append(
            Fact("gpu", f"cuda:{index}", f"{device.name}, {size}, sm_{device.major}{device.minor}")
        )
    return rows


def _backends() -> list[Fact]:
    from recurx import backends

    return [_backend(name, backends) for name in backends.ORDER]


def _backend(name: str, backends) -> Fact:
    try:
        reason = backends.get(name).why_unavailable()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    return Fact("backends", name, "available" if reason is None else reason, ok=reason is None)


def _verdicts() -> Fact:
    """What `auto` measured here in earlier processes."""
    from recurx import verdicts

    where = verdicts.folder()
    text = "not kept on disk (RECURX_CACHE=0, or no home)"
    return Fact("backends", "verdicts", text if where is None else f"{verdicts.count()} in {where}")
