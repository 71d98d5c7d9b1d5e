"""Compile .cu files into a shared library and call it with PyTorch's device memory.

The library links the CUDA runtime statically and shares the device's primary context with PyTorch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch

from aot import toolchain

KERNELS = toolchain.CUDA_FOLDER


class CudaError(RuntimeError):
    """A C entry returned an error; the message is rx_cuda_last_error()."""


def library(sources: Sequence[Path], arch: str) -> ctypes.CDLL:
    """The sources for one architecture ("80", "90", "90a"), built once for each content."""
    folders = {*toolchain.INCLUDED, *(source.parent for source in sources)}
    digests = [toolchain.sources_digest(folder) for folder in sorted(folders)]
    nvcc = toolchain.find_nvcc()
    path = toolchain.cached("gpu", ".so", nvcc, arch, sources, digests)
    if not path.exists():
        command = [nvcc, "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC"]
        command += [f"-I{folder}" for folder in toolchain.INCLUDED]
        # A plain architecture keeps its PTX too, so that a newer device can run it.
        codes = f"sm_{arch}" if arch[-1].isalpha() else f"[sm_{arch},compute_{arch}]"
        command += ["-gencode", f"arch=compute_{arch},code={codes}"]
        toolchain.run([*command, *sources, "-o", path.with_suffix(".part")])
        path.with_suffix(".part").replace(path)
    return ctypes.CDLL(str(path))


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
