"""What the kernels cost a build: size and compiling time of each family for each generation.

python tests/aot/build_table.py                     all, for the table of docs/engines.md
python tests/aot/build_table.py owner_sm80 86 120   one family for some generations

Compiles anew, one file at a time, and prints each as soon as it is known. Seconds are those of the
processor, so that a busy machine changes them little; MB are those of cubins.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from aot import cuda_cases, toolchain


def cost(source: Path, arch: str) -> tuple[float, float]:
    """(MB, seconds) of one file of csrc/cuda."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        kept, toolchain.CACHE = toolchain.CACHE, Path(folder)
        try:
            built = toolchain.nvcc_compile(source, arch, to="cubin")
        finally:
            toolchain.CACHE = kept
        size = built.cubin.stat().st_size / 1e6
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return size, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(family: str = "", *archs: str) -> None:
    for case in cuda_cases.cases():
        name = case.source.parent.name
        if case.source.stem != "launch" or family not in ("", name):
            continue
        for arch in case.archs:
            if not archs or arch in archs:
                size, seconds = cost(case.source, arch)
                print(f"{name:14} {arch:>4} {size:5.2f} MB {seconds:4.0f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
