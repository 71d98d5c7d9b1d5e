"""Which Triton puts fence.proxy.async between cp.async and the wgmma that reads what came.

By PTX's memory model what cp.async wrote to shared memory reaches wgmma only through that fence.
Triton 3.7 has it in every kernel of ours; 3.6 leaves it out (kernels/NOTES.md says where).
"""

from __future__ import annotations

import re

import pytest

from .. import build

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
triton = pytest.importorskip("triton")
from aot import triton_cases  # noqa: E402

from .test_kernels import linear_residual  # noqa: E402
from .triton_launch import emulating, fences_are_there  # noqa: E402


def unfenced(ptx: str) -> bool:
    """Whether a kernel multiplies by wgmma what cp.async brought, without any such fence."""
    fence = re.search(r"\bfence\.proxy\.async\b", ptx)
    return fence is None and "wgmma.mma_async" in ptx and "cp.async" in ptx


def test_the_race_checker_tells_the_versions_apart() -> None:
    """The same kernel, checked for proxies: right since 3.7, a fault before."""
    call, _ = linear_residual()
    if fences_are_there():
        with emulating("90", proxies=1):
            call()
        return
    with (
        pytest.raises(build.EmulatorFault, match=r"missing fence\.proxy\.async"),
        emulating("90", proxies=1),
    ):
        call()
    with emulating("90"):  # nothing but that
        call()


@pytest.mark.slow
def test_fences_are_in_every_kernel_or_the_note_is_needed() -> None:
    cases = [case for case in triton_cases.cases() if "90" in case.archs]
    lacking = {case.label for case in cases if unfenced(case.compile("90").ptx)}
    assert not lacking if fences_are_there() else lacking, lacking


def test_a_kernel_without_its_fence_would_be_seen() -> None:
    ptx = "cp.async.cg.shared.global\nwgmma.mma_async.sync.aligned\n"
    assert unfenced(ptx) and not unfenced(ptx + "fence.proxy.async.shared::cta;")
    assert not unfenced("cp.async.cg.shared.global\nmma.sync.aligned\n")
