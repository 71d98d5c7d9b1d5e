"""`python -m recurx env`: facts about this machine and this copy of recurx, for bug reports.

Nothing here may fail: a broken part is a fact to report, so each one that can break is reported
with its error in place of its value.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recurx.errors import how_to_compile
from recurx.options import option

# /proc/cpuinfo's names of the instruction sets that the CPU engine chooses among.
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_tile", "amx_bf16")
Facts = Iterator["tuple[str, str] | tuple[str, str, bool]"]  # name, value, and `Fact.ok`


@dataclass(frozen=True)
class Options:
    json: bool = option(False, "print one line of JSON instead")


@dataclass(frozen=True)
class Fact:
    """One line of the report; `ok` is False where something that could work does not."""

    group: str
    name: str
    value: str
    ok: bool = True


def run(asked: Options) -> int:
    from recurx.cli import output

    facts = collect()
    if asked.json:
        output.json_line({"facts": [dataclasses.asdict(fact) for fact in facts]})
        return 0
    console = output.make_console()
    width = max(len(fact.name) for fact in facts)
    for group, found in itertools.groupby(facts, lambda fact: fact.group):
        console.print(group, style="bold")
        for fact in found:
            mark = " " if fact.ok else "!"
            console.print(f"  {mark} {fact.name:{width}}  {fact.value}", soft_wrap=True)
    return 0


def collect() -> list[Fact]:
    """All facts, grouped and in the order of reading. Imports torch, and triton if it is there."""
    groups = {
        "software": _software, "compiled module": _build, "cpu": _cpu, "gpu": _gpu,
        "backends": _backends,
    }  # fmt: skip
    return [Fact(group, *fact) for group, facts in groups.items() for fact in facts()]


def _software() -> Facts:
    import recurx

    yield "recurx", f"{recurx.__version__} in {Path(recurx.__file__).parent}"
    yield "python", f"{platform.python_version()} ({platform.platform()})"
    for name in ("torch", "numpy", "triton", "safetensors"):
        try:
            yield name, importlib.import_module(name).__version__
        except Exception as error:
            yield name, f"not usable: {type(error).__name__}: {error}", False


def _build() -> Facts:
    """What the build decided (recorded by csrc/native_build.py) and whether its result loads."""
    try:
        info = importlib.import_module("recurx._build_info").INFO
        text, compiled = info["sentence"].removeprefix("recurx: "), info["compiler"] is not None
    except ImportError:
        text, compiled = "not built", False
    yield "build", text if compiled else f"{text.rstrip('.')}; {how_to_compile()}", compiled
    try:
        module = importlib.import_module("recurx._C")
    except ImportError as error:
        yield "recurx._C", f"does not load: {error}", False
        return
    yield "recurx._C", str(module.__file__)
    try:
        yield "CPU engine", f"uses {module.cpu_isa()}, of {', '.join(module.cpu_isas())}"
    except (RuntimeError, ValueError) as error:  # RECURX_CPU_ISA names one that this CPU lacks
        yield "CPU engine", str(error), False


def _cpu() -> Facts:
    import torch

    from recurx.measure import processor

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    model, flags = processor()
    yield "model", model
    yield "cores", f"{cores}, torch uses {torch.get_num_threads()} threads"
    yield "instruction sets", " ".join(flag for flag in CPU_FLAGS if flag in flags) or "baseline"


def _gpu() -> Facts:
    import torch

    built_for = torch.version.cuda
    if not torch.backends.cuda.is_built():
        yield "devices", "none: this torch is built without CUDA"
    elif not torch.cuda.is_available():
        text = f"none usable by torch (built for CUDA {built_for}): no device or driver"
        yield "devices", text, False
    else:
        yield "CUDA of torch", str(built_for)
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            size = f"{device.total_memory / 2**30:.0f} GiB, {device.multi_processor_count} SMs"
            yield f"cuda:{index}", f"{device.name}, {size}, sm_{device.major}{device.minor}"


def _backends() -> Facts:
    from recurx import backends, verdicts

    for name in backends.ORDER:
        try:
            reason = backends.get(name).why_unavailable()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        yield name, "available" if reason is None else reason, reason is None
    where = verdicts.folder()  # of what `auto` measured here in earlier processes
    kept = where and f"{verdicts.count()} in {where}"
    yield "verdicts", kept or "not kept on disk (RECURX_CACHE=0, or no home)"
