"""Compile .cu files into a shared library and call it with PyTorch's device memory.

The library links the CUDA runtime statically and shares the device's primary context with PyTorch.
"""

from __future__ import annotations

import ctypes
import fcntl
from collections.abc import Sequence
from pathlib import Path

import torch

from aot import toolchain

KERNELS = toolchain.CUDA_FOLDER


class CudaError(RuntimeError):
    """A C entry returned an error; the message is rx_cuda_last_error()."""


def library(sources: Sequence[Path], arch: str) -> ctypes.CDLL:
    """The sources for one architecture ("80", "90", "90a"), built once for each content."""
    nvcc, identity = toolchain.find_nvcc(), toolchain.identity(sources)
    path = toolchain.cached("gpu", ".so", toolchain.nvcc_version(), arch, *identity)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever needs it next waits, and does not compile too
        _make(path, nvcc, sources, arch)
    return ctypes.CDLL(str(path))


def _make(path: Path, nvcc: str | None, sources: Sequence[Path], arch: str) -> None:
    if not path.exists():
        command = [nvcc, "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC"]
        command += [f"-I{folder}" for folder in toolchain.INCLUDED]
        # A plain architecture keeps its PTX too, so that a newer device can run it.
        codes = f"sm_{arch}" if arch[-1].isalpha() else f"[sm_{arch},compute_{arch}]"
        command += ["-gencode", f"arch=compute_{arch},code={codes}"]
        toolchain.run([*command, *sources, "-o", path.with_suffix(".part")])
        path.with_suffix(".part").replace(path)


def call(lib: ctypes.CDLL, entry: str, *arguments: object) -> None:
    """Call a C entry that returns 0 or an error code, then wait for the device."""
    if getattr(lib, entry)(*arguments):
        lib.rx_cuda_last_error.restype = ctypes.c_char_p
        raise CudaError(lib.rx_cuda_last_error().decode())
    torch.cuda.synchronize()


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def runs_here(arch: str) -> bool:
    """Whether the current device can run code of this architecture."""
    major, minor = torch.cuda.get_device_capability()
    if arch[-1].isalpha():
        return f"{major}{minor}" == arch[:-1]
    return major * 10 + minor >= int(arch)
