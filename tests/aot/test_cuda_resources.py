"""Registers, spills, shared memory and tensor-core instructions of the CUDA kernels, without a GPU.

test_resources.py shows that each check bites. `python tests/aot/report.py` compiles every kernel
for every generation.
"""

from __future__ import annotations

import pytest
import torch

from aot import cuda_cases, report, resources, toolchain
from recurx import Problem, Schedule, Step
from recurx.nets import ATTENTION, TOKEN_MLP, BlockSpec, NetSpec
from recurx.plan import DEVICES
from recurx.plan import cuda as plan

needs_tools = pytest.mark.skipif(
    toolchain.triton_tools() is None or toolchain.find_nvcc() is None,
    reason="cuobjdump of the triton wheel or nvcc is not here",
)
CUDA = [
    pytest.param(case, arch, id=f"{case.label}-sm_{arch}")
    for case in cuda_cases.cases()
    for arch in cuda_cases.few_archs(case)
]


@needs_tools
@pytest.mark.parametrize("case, arch", CUDA)
def test_cuda_kernel(case, arch):
    rows = report.cuda_rows(case, arch, flags=cuda_cases.few(case, arch))
    assert rows, f"{case.source} holds no kernel for sm_{arch}"
    assert not any(faults for _, _, faults in rows), resources.table(rows)


@needs_tools
@pytest.mark.parametrize("arch", ["80", "120"])
def test_the_owner_kernel_of_six_row_tiles_with_h_in_scratch(tmp_path, arch):
    """Of T = 81 to 96 where a block has 99 KB: on 86 and 89, which run the code of 80, and on 120.
    The larger ones with h in scratch are compiled above."""
    case = cuda_cases.owner_alone(tmp_path, "X(512, 6, kScratch)")
    (row,) = report.cuda_rows(case, arch)
    assert row[0].endswith(" 512,6,1") and not row[2], resources.table([row])


@pytest.mark.parametrize("name", DEVICES)
def test_the_owners_that_a_generation_launches_are_compiled_for_it(name):
    device, found = DEVICES[name], set()
    (places,) = {
        cuda_cases.owner_places(arch)
        for arch in cuda_cases.ARCHS
        if resources.SHARED_LIMIT[arch] == device.shared_bytes
    }
    step = Schedule((Step("L", "z", ("z",), ("x",)),))
    for tokens in (81, 97, 112, 113, 128):
        attention = BlockSpec(ATTENTION, 512, 1536, num_heads=8)
        mixing = BlockSpec(TOKEN_MLP, 512, 1536, tokens=tokens, token_inner=512)
        for block in (attention, mixing):
            nets = (("L", NetSpec((block,))),)
            problem = Problem(step, nets, 128, tokens, 512, torch.bfloat16, "cuda", True)
            plans = plan.candidates(problem, device, kinds=("owner",))
            found |= {"scratch" if chosen["in_scratch"] else "shared" for chosen in plans}
    assert found == set(places)


@needs_tools
def test_rows_of_a_cluster_cost_no_fence_of_the_whole_gpu():
    """Of the grid kernel on Hopper: the ring has bulk copies, and no MEMBAR.ALL.GPU beside those of
    the two cluster barriers."""
    source = cuda_cases.CUDA_FOLDER / "grid_sm80" / "launch.cu"
    built = toolchain.nvcc_compile(source, "90", to="cubin", flags=("-DRX_LARGEST",))
    listing = toolchain.run([toolchain.cuobjdump(), "-sass", built.cubin])
    alone, ring = sorted(listing.split("Function : ")[1:], key=lambda part: part.split()[0])
    fences = [part.count("MEMBAR.ALL.GPU") for part in (alone, ring)]
    assert fences[1] == fences[0] + 2
    assert "UBLKCP" not in alone and "UBLKCP.S.G.MULTICAST" in ring
    assert ring.count("FENCE.VIEW.ASYNC.G") == 2  # of the two products
