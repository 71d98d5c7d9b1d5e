"""A driver that is older than the CUDA runtime of the build is told before anything is launched."""

from __future__ import annotations

import pytest

from recurx.backends.cuda import Cuda
from recurx.plan import DEVICES
from tests.backends.test_second_call import StubLibrary


class Build(StubLibrary):
    """A build that says what `recurx._C.cuda_devices` says."""

    def __init__(self, *said) -> None:
        super().__init__("owner")
        self.said, self.asked = said, 0

    def cuda_devices(self):
        self.asked += 1
        return self.said


OLD = "cudaGetDeviceCount: cudaErrorInsufficientDriver: CUDA driver version is insufficient"


@pytest.mark.parametrize(
    "said, reason",
    [
        ((1, 13000, 13000, ""), None),
        ((1, 13020, 13000, ""), None),
        ((2, 12080, 12040, ""), None),
        ((0, 12080, 13000, OLD), r"built with CUDA 13\.0.*driver here is for CUDA 12\.8.*580"),
        ((0, 12020, 13010, OLD), r"built with CUDA 13\.1.*driver here is for CUDA 12\.2"),
        ((0, 13000, 13000, "no CUDA-capable device"), "finds no device: no CUDA-capable device"),
    ],
)
def test_the_reason_names_both_versions(said, reason) -> None:
    build = Build(*said)
    cuda = Cuda(build, DEVICES["h100"])
    found = [cuda.why_unavailable() for _ in range(2)]
    assert build.asked == 1  # the driver is asked once a process
    assert found[0] == found[1]
    if reason is None:
        assert found == [None, None]
    else:
        import re

        assert re.search(reason, found[0])


def test_a_build_that_cannot_say_is_taken_as_it_is() -> None:
    assert Cuda(StubLibrary("owner"), DEVICES["h100"]).why_unavailable() is None
