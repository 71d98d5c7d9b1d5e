"""Scopes of PTX's releases, acquires and fences, and the warps that .aligned instructions want."""

from __future__ import annotations

import numpy as np
import pytest

from .. import build
from .run import PtxKernel

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))

SEEDS = range(1, 11)
STALE = "stale L1: plain load of data written by another CTA without a gpu-scope acquire"
RACE = "race: read after write at global memory 'data'"

# CTA 0 writes words and raises a flag; thread 0 of CTA 1 watches it, then all of CTA 1 read.
HANDOVER = """.version 8.0
.target sm_90
.visible .entry check(.param .u64 data, .param .u64 flag)
{
.reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p<4>;
ld.param.u64 %rd1, [data];
ld.param.u64 %rd2, [flag];
mov.u32 %r1, %tid.x;
mov.u32 %r2, %ctaid.x;
mul.wide.u32 %rd3, %r1, 4;
add.s64 %rd4, %rd1, %rd3;
setp.eq.u32 %p1, %r2, 1;
setp.ne.u32 %p2, %r1, 0;
@%p1 bra reader;
st.global.u32 [%rd4], %r1;
bar.sync 0;
@%p2 bra done;
RELEASE
bra done;
reader:
@%p2 bra seen;
watch:
ACQUIRE
setp.eq.u32 %p3, %r3, 0;
@%p3 bra watch;
AFTER
seen:
bar.sync 0;
xor.b32 %r4, %r1, 1;
mul.wide.u32 %rd5, %r4, 4;
add.s64 %rd6, %rd1, %rd5;
LOAD %r5, [%rd6];
st.global.u32 [%rd4+256], %r5;
done:
ret;
}
"""
ADD, LOAD = "red.{}.global.add.u32 [%rd2], 1;", "ld.{}.global.u32 %r3, [%rd2];"
RELEASE, ACQUIRE = ADD.format("release.gpu"), LOAD.format("acquire.gpu")
RELAXED = ADD.format("relaxed.gpu"), LOAD.format("relaxed.gpu")
CASES = [
    # release, acquire, after it, found
    (RELEASE, ACQUIRE, "", ""),
    (ADD.format("release.cluster"), LOAD.format("acquire.cluster"), "", ""),
    (ADD.format("release.sys"), ACQUIRE, "", ""),
    ("st.release.gpu.global.u32 [%rd2], 1;", ACQUIRE, "", ""),
    (ADD.format("release.cta"), ACQUIRE, "", RACE),
    (RELEASE, LOAD.format("acquire.cta"), "", STALE),
    (RELAXED[0], ACQUIRE, "", RACE),
    (RELEASE, RELAXED[1], "", STALE),
    (RELEASE, LOAD.format("volatile"), "", STALE),
    (RELEASE, RELAXED[1], "fence.acq_rel.gpu;", ""),
    (RELEASE, LOAD.format("volatile"), "membar.gl;", ""),
    (RELEASE, RELAXED[1], "fence.acq_rel.cluster;", ""),
    (RELEASE, RELAXED[1], "fence.acq_rel.cta;", STALE),
    (RELEASE, RELAXED[1], "membar.cta;", STALE),
    ("fence.acq_rel.gpu;\n" + RELAXED[0], ACQUIRE, "", ""),
    ("membar.gl;\n" + ADD.format("relaxed.cluster"), ACQUIRE, "", ""),
    ("fence.acq_rel.cta;\n" + RELAXED[0], ACQUIRE, "", RACE),
    ("fence.sc.gpu;\n" + ADD.format("relaxed.cta"), ACQUIRE, "", RACE),
]


def handover(release: str, acquire: str, after: str, load: str = "ld.global.u32") -> PtxKernel:
    text = HANDOVER.replace("RELEASE", release).replace("ACQUIRE", acquire)
    return PtxKernel(text.replace("AFTER", after).replace("LOAD", load))


def run(kernel: PtxKernel, seed: int) -> np.ndarray:
    """What CTA 1 has read."""
    data, flag = np.zeros(128, np.uint32), np.zeros(1, np.uint32)
    kernel.library.unwatch_all()
    kernel.library.watch(data.ctypes.data, data.nbytes, "data")
    kernel.configure(race=1, seed=seed)
    kernel.launch((2,), (64,), [data, flag], cluster=2)
    return data[64:]


@pytest.mark.parametrize("release, acquire, after, found", CASES)
def test_what_orders_two_ctas(release, acquire, after, found):
    kernel = handover(release, acquire, after)
    for seed in SEEDS:
        if found:
            with pytest.raises(build.EmulatorFault, match=found):
                run(kernel, seed)
        else:
            assert np.array_equal(run(kernel, seed), np.arange(64) ^ 1)


def test_the_cache_of_constants_is_never_emptied():
    with pytest.raises(build.EmulatorFault, match=r"ld\.global\.nc of memory that this launch"):
        run(handover(RELEASE, ACQUIRE, "", "ld.global.nc.u32"), 1)


DIVERGED = """.version 8.0
.target sm_80
.visible .entry check(.param .u64 out)
{
.reg .b32 %r<4>; .reg .pred %p<2>;
mov.u32 %r1, %laneid;
setp.lt.u32 %p1, %r1, 7;
@%p1 BARRIER;
@!%p1 BARRIER;
ret;
}
"""


def test_lanes_at_two_aligned_instructions():
    """`bar.sync` is `barrier.sync.aligned`; without .aligned each lane comes as it likes."""
    out = np.zeros(1, np.uint32)
    PtxKernel(DIVERGED.replace("BARRIER", "barrier.sync 0")).launch((1,), (64,), [out])
    for name in ("bar.sync 0", "barrier.sync.aligned 0"):
        kernel = PtxKernel(DIVERGED.replace("BARRIER", name))
        with pytest.raises(build.EmulatorFault, match=r"diverged warp: .* PTX line (8|9)"):
            kernel.launch((1,), (64,), [out])
        kernel.configure(aligned=0)
        kernel.launch((1,), (64,), [out])
