"""What the machine code of the cluster kernel must and must not hold, beside its resources."""

from __future__ import annotations

import re

import pytest

from aot import cuda_cases, toolchain

SOURCE = cuda_cases.CUDA_FOLDER / "cluster_sm90a" / "launch.cu"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(toolchain.find_nvcc() is None, reason="nvcc is not here"),
    pytest.mark.skipif(toolchain.triton_tools() is None, reason="cuobjdump is not here"),
]


@pytest.fixture(scope="module")
def listings() -> dict[str, str]:
    """The machine code of the kernel at each width."""
    built = toolchain.nvcc_compile(SOURCE, "90a", to="cubin")
    listing = toolchain.run([toolchain.cuobjdump(), "-sass", built.cubin])
    parts = re.split(r"Function : (\S+)", listing)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_registers_stay_within_what_setmaxnreg_leaves(listings):
    """ptxas does not promise it: the producer must do with 24, the consumers with 240."""
    assert len(listings) == 5  # the widest with 112 and with 128 rows
    for name, listing in listings.items():
        assert re.findall(r"USETMAXREG.* (0x\w+) ;", listing) == ["0xf0", "0x18"], name
        # Behind the producer's EXIT are the consumers' loops of a wait that did not pass at once.
        producer = listing.partition("USETMAXREG.DEALLOC")[2].partition("EXIT")[0]
        for limit, code in ((240, listing), (24, producer)):
            used = max(int(register) for register in re.findall(r"\bR(\d+)\b", code))
            assert used < limit, f"{name}: R{used}, {limit} are granted"


def test_no_fence_of_the_whole_gpu_but_at_the_cluster_barriers(listings):
    """MEMBAR.ALL.GPU at every stage, and an empty L1 after every wait, is what mbar_arrive_remote,
    mbar_wait and fence_proxy_async would bring; cluster barriers have one each. There is one at
    both ends, one behind the first slots, and three a supervision step for either role."""
    for name, listing in listings.items():
        for instruction in ("MEMBAR.ALL.GPU", "CCTL.IVALL"):
            assert listing.count(instruction) == 9, f"{name}: {instruction}"
