"""One deleted instruction of each kind; `python -m emulator.ptx.deletions` deletes every one."""

from __future__ import annotations

import pytest

from aot import toolchain

from ..build import unavailable

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
    pytest.mark.skipif(toolchain.find_nvcc() is None, reason="nvcc is not here"),
]
from . import deletions  # noqa: E402

CHOSEN = {
    "sm80": ("bar.sync", "cp.async commit", "cp.async wait"),
    "sm90a": ("wgmma wait", "cluster barrier", "mbarrier arrive", "mbarrier wait"),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_the_last_of_each_kind_is_missed(name):
    subject = deletions.SUBJECTS[name]()
    last = {d.kind: d for d in deletions.deletions(subject.texts[0])}
    findings = [deletions.examine(subject, last[kind], only_checked=True) for kind in CHOSEN[name]]
    assert all(finding.found for finding in findings), findings


def test_a_predicated_wait_and_a_barrier_pair_are_deleted_whole():
    ptx = """
    @%p1 bar.sync 0;
    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;
    mbarrier.try_wait.parity.shared::cta.b64 done, [%r1], %r2;
    """
    texts = [deletions.without(ptx, d).split() for d in deletions.deletions(ptx)]
    barrier, cluster, wait = (" ".join(text) for text in texts)
    assert "bar.sync" not in barrier and "%p1" not in barrier
    assert "cluster" not in cluster and "bar.sync" in cluster
    assert "setp.eq.u32 done, 1, 1;" in wait and "try_wait" not in wait
