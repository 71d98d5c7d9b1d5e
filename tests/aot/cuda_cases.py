"""Every CUDA kernel file with the architectures it is compiled for, and what it is meant to use.

The folder's name says it, by the rule of csrc/native_tools.py: `*_sm90a/` holds instructions of
that generation alone, any other file is compiled for all. What is meant follows from the name too:
launch.cu of a `*_sm80` folder holds a mma.sync kernel, that of a `*_sm90a` folder a wgmma one fed
by bulk copies; other files hold no products. Dynamic shared memory is not in a cubin: the headers
static_assert it.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from aot.resources import SHARED_LIMIT, Need
from aot.toolchain import CUDA_FOLDER

sys.path.insert(0, str(CUDA_FOLDER.parent))

from native_tools import ALL_CUDA_ARCHS as ARCHS
from native_tools import WHEEL_CUDA_ARCHS

# Recursion kernels: they read the states and the scratch that they write.
_NEEDS = {
    "80": Need(tensor=("HMMA",), constant_loads=False),
    "90a": Need(tensor=("HGMMA",), bulk=True, constant_loads=False),
}
# Of SwiGLU, softmax and norms, and of the tables that the grid kernel makes at its start; its
# stages divide by multiplying. It had 118 when they did not.
_MAX_RECIPROCALS = {"grid_sm80": 50}


@dataclass(frozen=True)
class CudaCase:
    source: Path
    archs: tuple[str, ...]
    need: Need

    @property
    def label(self) -> str:
        return f"{self.source.parent.name}/{self.source.stem}"


def cases(folder: Path = CUDA_FOLDER) -> list[CudaCase]:
    """The files that hold kernels; host-only files (`__global__` nowhere near) are left out."""
    return [_read(path) for path in sorted(folder.rglob("*.cu")) if _has_kernel(path)]


def owner_alone(folder: Path, plan: str) -> CudaCase:
    """The owner kernel of one line of RX_OWNER_PLANS alone, by a source written to `folder`."""
    source = folder / "owner_alone.cu"
    launch = CUDA_FOLDER / "owner_sm80" / "launch.cu"
    assert plan in launch.read_text(), f"{launch} does not compile {plan}"
    source.write_text(f'#define RX_OWNER_PLANS(X) {plan}\n#include "owner_sm80/launch.cu"\n')
    return CudaCase(source, ARCHS, _NEEDS["80"])


# The owner kernels with most registers, by where h lies (nvcc splits a list at a bare comma).
_OWNERS = {
    "shared": r"X(512\, 8\, kShared)",
    "scratch": r"X(512\, 7\, kScratch) X(512\, 8\, kScratch)",
}


def owner_places(arch: str) -> tuple[str, ...]:
    """Where h of D = 512 may lie on a generation; test_cuda_resources.py holds plans against it."""
    if SHARED_LIMIT[arch] <= 101376:
        return ("scratch",)
    return ("shared",) if SHARED_LIMIT[arch] >= 232448 else ("shared", "scratch")


def few_archs(case: CudaCase) -> tuple[str, ...]:
    """Where a file takes ptxas a quarter of a minute or more, the generations that ship with code
    of their own: 86 and 89 run that of 80. report.py compiles all."""
    heavy = case.label in ("owner_sm80/launch", "grid_sm80/launch")
    return WHEEL_CUDA_ARCHS if heavy else case.archs


def few(case: CudaCase, arch: str) -> tuple[str, ...]:
    """The flags that leave kernels out of a file: where ptxas takes ten seconds each, the largest
    that the generation launches stand for all. report.py compiles all."""
    if case.label == "owner_sm80/launch":
        return (f"-DRX_OWNER_PLANS(X)={' '.join(_OWNERS[at] for at in owner_places(arch))}",)
    return ("-DRX_LARGEST",) if "RX_LARGEST" in case.source.read_text() else ()


def _has_kernel(path: Path) -> bool:
    text = path.read_text()
    if '#include "kernel.cuh"' in text:
        text += (path.parent / "kernel.cuh").read_text()
    return "__global__" in text


def _read(path: Path) -> CudaCase:
    named = re.search(r"_sm(\d+[af]?)$", path.parent.name)
    generation = named[1] if named else ""
    only = generation[-1:] in ("a", "f")
    need = _NEEDS[generation] if generation and path.stem == "launch" else Need(tensor=())
    if need.tensor:
        need = replace(need, max_reciprocals=_MAX_RECIPROCALS.get(path.parent.name))
    return CudaCase(path, (generation,) if only else ARCHS, need)
