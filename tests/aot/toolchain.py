"""The compilers and inspectors that need no GPU, and a cache of what they made.

nvcc comes from the machine (CUDA 12.8 or newer for sm_120, found on PATH or through CUDA_HOME);
ptxas, cuobjdump and nvdisasm for Triton's PTX ship inside the triton wheel.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from locked import locked

CACHE = Path(
    os.environ.get("RECURX_TEST_CACHE", Path(__file__).parents[2] / "build" / "test-cache")
)

CUDA_FOLDER = Path(__file__).parents[2] / "csrc" / "cuda"
# What a source may include beside its own folder: shipped headers, and those of tests' kernels.
INCLUDED = (CUDA_FOLDER, Path(__file__).parents[1] / "emulator" / "fixtures")

# ptxas prints these as mere information, with or without -Werror, and each means that the code is
# not what was written: 7508 setmaxnreg ignored, 7510 wgmma serialised, 7517 a wait and 7519 a fence
# were injected because the source lacks them.
BAD_PTXAS_LINES = re.compile(r"C75(?:08|10|17|19)")


class ToolFailed(RuntimeError):
    """A compiler or inspector returned an error; the message is its output."""


@dataclass(frozen=True)
class Built:
    """A cubin, and what the assembler said while making it."""

    cubin: Path
    log: str


def run(command: list[object]) -> str:
    """Standard output and error of `command` together; ToolFailed if it fails."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=1800, check=False
    )
    if done.returncode:
        raise ToolFailed(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


@functools.cache
def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


@functools.cache
def triton_tools() -> Path | None:
    """The folder of ptxas, cuobjdump and nvdisasm in the triton wheel."""
    try:
        import triton
    except ImportError:
        return None
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return folder if (folder / "cuobjdump").exists() else None


@functools.cache
def nvcc_version() -> str:
    """What nvcc says of itself, in the place of where it lies."""
    return run([find_nvcc(), "--version"])


def cuobjdump() -> str:
    folder = triton_tools()
    found = str(folder / "cuobjdump") if folder else shutil.which("cuobjdump")
    if not found:
        raise ToolFailed("cuobjdump not found: pip install triton, or put CUDA's on PATH")
    return found


def cached(kind: str, suffix: str, *ingredients: object) -> Path:
    """The path of a cached result; the same ingredients give the same path.

    No ingredient is an absolute path: a checkout elsewhere, with the cache carried along, finds it.
    """
    assert not any(str(CUDA_FOLDER.parents[1]) in str(part) for part in ingredients), ingredients
    digest = hashlib.sha256("\0".join(map(str, ingredients)).encode()).hexdigest()[:24]
    CACHE.mkdir(parents=True, exist_ok=True)
    return CACHE / f"{kind}-{digest}{suffix}"


def sources_digest(folder: Path, patterns: tuple[str, ...] = ("*.cu", "*.cuh", "*.h")) -> str:
    """One hash over all headers and sources, so that an edited header rebuilds what includes it."""
    digest = hashlib.sha256()
    for pattern in patterns:
        for path in sorted(folder.rglob(pattern)):
            name = str(path.relative_to(folder))
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def identity(sources: Sequence[Path]) -> tuple[object, ...]:
    """Names and contents of sources and of all that they may include, wherever they lie."""
    # A copy of csrc/cuda, whose families include each other, or some folder.
    roots = [
        next((f for f in source.parents[:2] if (f / "api.h").exists()), source.parent)
        for source in sources
    ]
    names = [str(source.relative_to(root)) for source, root in zip(sources, roots, strict=True)]
    return (*names, *(sources_digest(folder) for folder in (*dict.fromkeys(roots), *INCLUDED)))


def nvcc_compile(source: Path, arch: str, to: str, flags: tuple[str, ...] = ()) -> Built:
    """Compile a .cu for one architecture ("80", "90a") to "cubin" or "ptx"."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise ToolFailed("nvcc not found: install CUDA, or set CUDA_HOME")
    out = cached("nvcc", f".{to}", nvcc_version(), *identity([source]), arch, flags)
    log = out.with_suffix(".log")
    with locked(out.with_suffix(".lock")):
        if not (out.exists() and log.exists()):
            # -gencode and not -arch: the shorthand also runs a pass without the "a" features.
            code = f"sm_{arch}" if to == "cubin" else f"compute_{arch}"
            command = [
                nvcc,
                "-std=c++17",
                "-O3",
                *(f"-I{folder}" for folder in INCLUDED),
                *flags,
                f"--{to}",
                "-Xptxas",
                "-v",
            ]
            command += ["-gencode", f"arch=compute_{arch},code={code}"]
            text = run([*command, source, "-o", out.with_suffix(".part")])
            log.write_text(text)
            out.with_suffix(".part").replace(out)
    return Built(out, log.read_text())
