"""Compiles what the phases need, for this device alone and all at once.

recurx._C by csrc/native_build.py, and the libraries of tests and microbenchmarks, whose cache may
have been carried along (build/test-cache, keyed by contents).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.gpu_check import sizes
from bench.gpu_check.journal import emit
from bench.gpu_check.phases import ROOT

MICRO = Path(__file__).with_name("micro.cu")


def main() -> int:
    major, minor = torch.cuda.get_device_capability()
    todo = jobs(f"{major}{minor}")
    with ThreadPoolExecutor(len(todo)) as pool:
        return int(not all(pool.map(_timed, todo, todo.values())))


def jobs(arch: str) -> dict[str, Callable[[], Any]]:
    """{name: what compiles it}."""
    from nvcc_library import KERNELS, library

    from emulator import gemm_residual_rms as gemm
    from emulator import grid, wrapper_cases

    own = f"{arch}a" if arch == "90" else arch
    wrappers = {"sm80.cu": "80", "sm90.cu": "90", "sm90a.cu": "90a"}
    found: dict[str, Callable[[], Any]] = {}
    if sizes.BUILD_MODULE:
        found["module"] = lambda: native(arch)
    for file, target in wrappers.items():
        if int(target.rstrip("a")) <= int(arch) and (own == target or target[-1] != "a"):
            found[f"wrappers {file}"] = lambda f=file, t=target: library(
                [wrapper_cases.FOLDER / f, wrapper_cases.FOLDER / "errors.cu"], t
            )
    found["grid"] = lambda: library([KERNELS / name for name in grid.FILES], arch)
    kernels = {"sm80": "80", "sm90a": "90a"} if arch == "90" else {"sm80": "80"}
    for kernel, target in kernels.items():
        found[f"gemm {kernel}"] = lambda k=kernel, t=target: library(
            [*gemm.kernels(k), KERNELS / "runtime.cu"], t
        )
    if arch == "90":
        found["micro"] = lambda: library([MICRO], "90a")
    return found


def native(arch: str) -> None:
    """recurx._C. Without its CUDA part it must fail, not fall back."""
    environ = {**os.environ, "RECURX_CUDA": "1", "RECURX_CUDA_ARCHS": arch}
    command = [sys.executable, "csrc/native_build.py"]
    subprocess.run(command, cwd=ROOT, env=environ, check=True)


def _timed(name: str, make: Callable[[], Any]) -> bool:
    begin, error = time.perf_counter(), ""
    try:
        make()
    except Exception as failure:  # the other jobs go on
        error = f"{type(failure).__name__}: {failure}"[-2000:]
    emit("built", name=name, seconds=round(time.perf_counter() - begin, 1), error=error)
    return not error


if __name__ == "__main__":
    sys.exit(main())
