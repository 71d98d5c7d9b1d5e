"""Where a measurement comes from: commit, machine and versions, as one JSON-ready dict."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

# The checkout, if there is one: installed packages have no commit to name.
ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("fma", "avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


def in_checkout() -> bool:
    return (ROOT / "bench" / "results").is_dir() and (ROOT / "csrc").is_dir()


def results_folder() -> Path:
    """Where results go and are looked for: bench/results of the checkout, else here."""
    return ROOT / "bench" / "results" if in_checkout() else Path("bench-results")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu() -> dict[str, Any]:
    from recurx import measure

    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if cpuinfo.exists() else []:
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    flags = set(fields.get("flags", "").split())
    return {
        "model": fields.get("model name", platform.processor()),
        "family_model": f"{fields.get('cpu family', '?')}/{fields.get('model', '?')}",
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "engine": measure.engine_isa(),  # RECURX_CPU_ISA or a sample product chooses among them
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any]:
    import torch

    found = torch.cuda.get_device_properties(0)
    query = ("--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader")
    return {
        "name": found.name,
        "capability": [found.major, found.minor],
        "multiprocessors": found.multi_processor_count,
        "memory_mib": found.total_memory >> 20,
        "cuda": torch.version.cuda,
        "driver_clock_power": _output("nvidia-smi", *query) or None,
    }


def provenance(device: str, threads: int, command: list[str] | None = None) -> dict[str, Any]:
    """Facts that a row needs to be believed later; `device` is "cpu" or "cuda"."""
    import recurx

    commit = _output("git", "rev-parse", "HEAD") if in_checkout() else ""
    words = sys.argv[1:] if command is None else command
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m recurx", *words]),
        "commit": commit or None,
        "dirty": bool(_output("git", "status", "--porcelain")) if commit else None,
        "device": device,
        "cpu": _cpu(),
        "gpu": _gpu() if device == "cuda" else None,
        "threads": threads,
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "recurx": recurx.__version__,
        "kernel": platform.release(),
    }
    facts |= {name: _version(name) for name in ("torch", "triton", "numpy")}
    return facts


def device_name(facts: dict[str, Any]) -> str:
    """What two results must share to be compared: the GPU, or the processor with its threads."""
    if facts.get("gpu"):
        return str(facts["gpu"]["name"])
    cpu = facts["cpu"]
    return f"{cpu['model']} ({cpu['family_model']}), {facts['threads']} threads"
