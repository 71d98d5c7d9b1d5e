"""What the Triton kernels use without a GPU: registers, spills, memory, tensor-core instructions.

The first test compiles the real kernels. The others show that each check bites, also on those of
CUDA: small sources that spill, ask for too much, miss their tensor-core instruction or their fence.
`python tests/aot/report.py` prints the whole table.
"""

from __future__ import annotations

from collections import Counter

import pytest

from aot import cuda_cases, report, resources, toolchain, triton_cases
from aot.resources import Need, Usage

needs_cuobjdump = pytest.mark.skipif(
    toolchain.triton_tools() is None, reason="cuobjdump of the triton wheel is not here"
)
needs_nvcc = pytest.mark.skipif(toolchain.find_nvcc() is None, reason="nvcc is not here")

TRITON = [
    pytest.param(case, arch, id=f"{case.label} sm_{arch}".replace(" ", "-"))
    for case in triton_cases.cases()
    for arch in case.archs
]


@needs_cuobjdump
@pytest.mark.parametrize("case, arch", TRITON)
def test_triton_kernel(case, arch):
    row = report.triton_row(case, arch)
    assert not row[2], resources.table([row])


SPILLS = """
__global__ void __launch_bounds__(1024) spills(float* p) {
  float v[200];
  #pragma unroll
  for (int i = 0; i < 200; i++) v[i] = p[i * 1024 + threadIdx.x];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < 200; i++) p[i * 1024 + threadIdx.x] = v[199 - i] * v[i];
}
"""
CONSTANT = "__global__ void constant(float* p, const float* q) { *p = __ldg(q + threadIdx.x); }"
DIVIDES = "__global__ void divides(int* p, int d) { p[threadIdx.x] /= d; }"
PLAIN = "__global__ void plain(float* p) { p[threadIdx.x] *= 2; }"


# wgmma whose accumulators are touched between the product and its wait.
UNWAITED = """
__global__ void unwaited(float* p, unsigned long long a, unsigned long long b) {
  float d[4] = {p[0], p[1], p[2], p[3]};
  #define MMA asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 " \\
    "{%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;" \\
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b))
  asm volatile("wgmma.fence.sync.aligned;");
  MMA;
  asm volatile("wgmma.commit_group.sync.aligned;");
  d[0] += 1;
  MMA;
  asm volatile("wgmma.commit_group.sync.aligned;");
  asm volatile("wgmma.wait_group.sync.aligned 0;");
  for (int i = 0; i < 4; i++) p[threadIdx.x * 4 + i] = d[i];
}
"""


def compiled(tmp_path, text, arch):
    source = tmp_path / "kernel.cu"
    source.write_text(text)
    (usage,) = resources.read(toolchain.nvcc_compile(source, arch, to="cubin"), arch)
    return usage


@needs_cuobjdump
@needs_nvcc
def test_a_spill_is_found(tmp_path):
    usage = compiled(tmp_path, SPILLS, "80")
    assert usage.counts["STL"] and usage.stack
    assert any("spills" in fault for fault in usage.faults(Need(tensor=())))


@needs_cuobjdump
@needs_nvcc
def test_a_missing_tensor_core_instruction_is_found(tmp_path):
    usage = compiled(tmp_path, PLAIN, "80")
    assert usage.faults(Need(tensor=())) == []
    assert usage.faults(Need(tensor=("HMMA",))) == ["no HMMA instruction"]
    assert "no bulk copy" in usage.faults(Need(tensor=(), bulk=True))


@needs_cuobjdump
@needs_nvcc
@pytest.mark.parametrize("arch", cuda_cases.ARCHS)
def test_a_load_through_the_cache_of_constants_is_found(tmp_path, arch):
    usage = compiled(tmp_path, CONSTANT, arch)
    assert usage.faults(Need(tensor=(), constant_loads=False)) == ["1 LDG.CONSTANT"]
    assert usage.faults(Need(tensor=())) == []
    clean = compiled(tmp_path, PLAIN, arch)
    assert clean.faults(Need(tensor=(), constant_loads=False)) == []


@needs_cuobjdump
@needs_nvcc
def test_a_division_is_found(tmp_path):
    usage = compiled(tmp_path, DIVIDES, "90")
    assert usage.faults(Need(tensor=(), max_reciprocals=1)) == []
    fault = "1 MUFU.RCP, at most 0 are meant"
    assert usage.faults(Need(tensor=(), max_reciprocals=0)) == [fault]


@needs_cuobjdump
@needs_nvcc
def test_a_wgmma_that_the_assembler_serialises_is_found(tmp_path):
    usage = compiled(tmp_path, UNWAITED, "90a")
    assert usage.counts["HGMMA"] == 2
    assert any("C75" in fault for fault in usage.faults(Need(tensor=("HGMMA",))))


@needs_cuobjdump
@needs_nvcc
def test_a_kernel_that_is_a_trap_alone_is_left_out(tmp_path):
    source = tmp_path / "kernel.cu"
    source.write_text(PLAIN + '__global__ void traps() { asm volatile("trap;"); }')
    case = cuda_cases.CudaCase(source, ("80",), Need(tensor=()))
    assert [usage.kernel for _, usage, _ in report.cuda_rows(case, "80")] == ["_Z5plainPf"]


def test_too_much_shared_memory_is_found():
    usage = Usage("k", "89", 100, 0, 110592, Counter(HMMA=1))
    assert usage.faults(Need()) == ["110592 bytes of shared memory, sm_89 has 101376"]


def test_the_folder_of_a_cuda_file_says_what_it_is(tmp_path):
    for folder in ("a_sm90a", "b_sm80"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "kernel.cuh").write_text(PLAIN)
        (tmp_path / folder / "launch.cu").write_text('#include "kernel.cuh"\n')
    (tmp_path / "b_sm80" / "pack.cu").write_text(PLAIN)
    (tmp_path / "c.cu").write_text(PLAIN)
    (tmp_path / "host.cu").write_text("int f() { return 1; }")
    own, all_of_them, packing, plain = cuda_cases.cases(tmp_path)
    assert own.archs == ("90a",) and own.need.bulk and own.need.tensor == ("HGMMA",)
    assert all_of_them.archs == cuda_cases.ARCHS and all_of_them.need.tensor == ("HMMA",)
    assert packing.archs == cuda_cases.ARCHS and packing.need.tensor == ()
    assert plain.need.tensor == ()
