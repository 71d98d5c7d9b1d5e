"""The grid kernel from the PTX that nvcc emits, with the race checker on."""

from __future__ import annotations

import pytest
import torch

from aot import toolchain
from recurx import Schedule
from tests.factories import make_inputs, make_net, rope
from tests.test_numerics import teacher_forced

from ..build import KERNELS, unavailable
from .run import load_ptx

pytestmark = [
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
    pytest.mark.skipif(toolchain.find_nvcc() is None, reason="nvcc is not here"),
]
from ..grid import FILES, GridKernel, Plan  # noqa: E402


@pytest.mark.slow
def test_nvcc_ptx():
    source = KERNELS / FILES[0]
    ptx = toolchain.nvcc_compile(source, "80", to="ptx").cubin.read_text()
    library = load_ptx([ptx], FILES)
    kernel = GridKernel(library, Plan(2, (1, 2, 1, 1), (2, 4, 1, 8)))
    shape = dict(tokens=17, hidden=64)
    for kind in ("attention", "token_mlp"):
        library.configure(race=1, seed=3)
        schedule, nets = Schedule.trm(1, 1), {"L": make_net(kind, **shape)}
        teacher_forced(kernel.run, schedule, nets, torch.bfloat16, **shape)
        x, carry = make_inputs(schedule, batch=1, dtype=torch.bfloat16, **shape)
        first = kernel.run(schedule, nets, x, carry, rope(**shape))
        library.configure(race=1, seed=4)
        again = kernel.run(schedule, nets, x, carry, rope(**shape))
        assert all(torch.equal(first[name], again[name]) for name in first)
    assert library.stat("flop") > 0, "the C++ ran in the place of the PTX"
