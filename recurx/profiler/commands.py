"""Ready command lines for NVIDIA's tools, aimed at the kernel that costs most."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

# Names of recurx's own kernels start so; without a CUDA profile they are what one looks for.
OWN_KERNELS = "rx_|recurx|_kernel"


def commands(
    script: str, kernels: Iterable[tuple[str, float, float]], stage_of_top: str = ""
) -> list[str]:
    """nsys and ncu lines.

    Args:
        script: what to run, e.g. "python -m recurx profile --preset trm-att --nvtx".
        kernels: (name, start us, us) of a CUDA profile; empty on a CPU.
        stage_of_top: stage that the costliest kernel belongs to.
    """
    total: dict[str, float] = defaultdict(float)
    for name, _, us in kernels:
        total[name] += us
    lines = [
        "# all of it, with recurx's NVTX ranges (step, net call, block, stage):",
        f"nsys profile -t cuda,nvtx -c cudaProfilerApi -o recurx {script}",
        "nsys stats -r cuda_gpu_kern_sum,nvtx_gpu_proj_sum recurx.nsys-rep",
    ]
    if total:
        top = max(total, key=lambda name: total[name])
        pattern = re.escape(re.split(r"[<(]", top)[0].rpartition("::")[2].split()[-1])
        where = f", stage {stage_of_top}" if stage_of_top else ""
        lines.append(f"# the costliest kernel ({total[top] / 1e3:.4g} ms a step{where}):")
    else:
        pattern = OWN_KERNELS
        lines.append("# one kernel in depth (this profile ran on a CPU; on a GPU it names one):")
    lines.append(
        f'ncu --set full --import-source yes -k "regex:{pattern}" --launch-skip 3 '
        f"--launch-count 1 -o recurx-kernel {script}"
    )
    return lines
