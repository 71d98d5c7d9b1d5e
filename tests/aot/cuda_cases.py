"""Every CUDA kernel file with the architectures it is compiled for, and what it is meant to use.

The file's name says it, by the rule of csrc/native_build.py: `*_sm90a.cu` holds instructions of
that generation alone, any other file is compiled for all. What is meant follows from the name too:
a `*_sm80` file is a mma.sync kernel, a `*_sm90a` file a wgmma one fed by bulk copies; other files
hold no products. Dynamic shared memory is not in a cubin: the headers static_assert it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from aot.resources import Need

CUDA_FOLDER = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHS = ("80", "89", "90", "100", "120")
_NEEDS = {"80": Need(tensor=("HMMA",)), "90a": Need(tensor=("HGMMA",), bulk=True)}


@dataclass(frozen=True)
class CudaCase:
    source: Path
    archs: tuple[str, ...]
    need: Need


def cases(folder: Path = CUDA_FOLDER) -> list[CudaCase]:
    """The files that hold kernels; host-only files (`__global__` nowhere near) are left out."""
    return [_read(path) for path in sorted(folder.rglob("*.cu")) if _has_kernel(path)]


def _has_kernel(path: Path) -> bool:
    texts = [path.read_text()]
    own_header = path.with_suffix(".cuh")
    if own_header.exists():
        texts.append(own_header.read_text())
    return any("__global__" in text for text in texts)


def _read(path: Path) -> CudaCase:
    named = re.search(r"_sm(\d+[af]?)$", path.stem)
    generation = named[1] if named else ""
    only = generation[-1:] in ("a", "f")
    need = _NEEDS.get(generation, Need(tensor=()))
    return CudaCase(path, (generation,) if only else ARCHS, need)
