"""Compile every kernel for every architecture and print what each uses.

python tests/aot/report.py            all of them; exit status 1 if any has a fault
python tests/aot/report.py rms 90     only labels that contain "rms", only sm_90
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from aot import cuda_cases, resources, toolchain, triton_cases
from aot.resources import Usage

Row = tuple[str, Usage, list[str]]


def triton_row(case: triton_cases.TritonCase, arch: str) -> Row:
    made = case.compile(arch)
    (usage,) = resources.read(made.built, arch, made.shared)
    return case.label, usage, usage.faults(case.need(arch))


def cuda_rows(case: cuda_cases.CudaCase, arch: str, flags: tuple[str, ...] = ()) -> list[Row]:
    """Without kernels that are nothing but a trap, since other generations run them."""
    built = toolchain.nvcc_compile(case.source, arch, to="cubin", flags=flags)
    return [
        (f"{case.label} {short_name(usage.kernel)}", usage, usage.faults(case.need))
        for usage in resources.read(built, arch)
        if usage.counts.keys() != {"TRAP"}
    ]


def short_name(mangled: str) -> str:
    """The template arguments of a mangled kernel name: enough to tell a file's kernels apart."""
    return ",".join(re.findall(r"L[ijbm](\d+)E", mangled)) or mangled[:20]


def rows(wanted: str = "", only_arch: str = "") -> list[Row]:
    found = []
    for case in triton_cases.cases(thorough=True):
        for arch in case.archs:
            if wanted in case.label and only_arch in ("", arch):
                found.append(triton_row(case, arch))
    if toolchain.find_nvcc():
        for cuda in cuda_cases.cases():
            for arch in cuda.archs:
                if wanted in cuda.label and only_arch in ("", arch):
                    found += cuda_rows(cuda, arch)
    return found


if __name__ == "__main__":
    result = rows(*sys.argv[1:3])
    print(resources.table(result))
    sys.exit(any(faults for _, _, faults in result))
