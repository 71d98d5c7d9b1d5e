"""The grid kernel from the PTX that nvcc emits, with the race checker on."""

from __future__ import annotations

import pytest
import torch

from aot import toolchain
from recurx import Schedule
from recurx.nets import KINDS, Net, NetSpec
from tests.factories import make_inputs, make_net, quantize_net, rope

from ..build import KERNELS, load_kernels, unavailable
from .run import load_ptx

pytestmark = [
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
    pytest.mark.skipif(toolchain.find_nvcc() is None, reason="nvcc is not here"),
]
from ..grid import FILES, GridKernel, Plan  # noqa: E402


# The FP8 kernel has all that the bf16 one has; add False here to translate that one too.
@pytest.mark.slow
@pytest.mark.parametrize("arch, cluster", [("80", 1), ("90", 2)])
@pytest.mark.parametrize("fp8", [True], ids=["fp8"])
def test_nvcc_ptx(fp8, arch, cluster):
    """One call of a net of both kinds of block, twice, and the bits of the C++."""
    source = KERNELS / FILES[0]
    ptx = toolchain.nvcc_compile(source, arch, to="ptx").cubin.read_text()
    library = load_ptx([ptx], FILES, wanted=f"kernelILb{int(fp8)}ELb{int(cluster > 1)}E")
    plan = Plan(2, (1, 2 // cluster, 1, 1), (2, 4, 1, 8), fp8=fp8, cluster=cluster)
    first, second = (make_net(kind, blocks=1) for kind in KINDS)
    net = Net(NetSpec(first.spec.blocks + second.spec.blocks), first.weights + second.weights)
    schedule, nets = Schedule.single_z(1, 1), {"L": quantize_net(net) if fp8 else net}
    x, carry = make_inputs(schedule, batch=1, dtype=torch.bfloat16)
    want = GridKernel(load_kernels(FILES, checked=False), plan).run(
        schedule, nets, x, carry, rope()
    )
    for seed in (3, 4):
        library.configure(race=1, seed=seed)
        got = GridKernel(library, plan).run(schedule, nets, x, carry, rope())
        # exp and rsqrt are PTX's approximate ones here: a last bit may round the other way.
        error = (got["z"].double() - want["z"].double()).norm() / want["z"].double().norm()
        assert error < 1e-3, error
    assert library.stat("flop") > 0, "the C++ ran in the place of the PTX"
