"""The owner kernel from the PTX that nvcc emits, with the race checker on."""

from __future__ import annotations

import pytest
import torch

from aot import cuda_cases, toolchain
from recurx import Schedule
from recurx.nets import ATTENTION, KINDS, TOKEN_MLP
from recurx.plan import DEVICES
from tests.factories import make_inputs, make_net, rope
from tests.test_numerics import teacher_forced

from ..build import KERNELS, unavailable
from ..owner import FILES, EmulatedCuda
from .run import load_ptx

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
    pytest.mark.skipif(toolchain.find_nvcc() is None, reason="nvcc is not here"),
]
PLANS = ((64, 2),)
VARIED = {
    ATTENTION: dict(residual_scale=0.5, activation="gelu", kv_heads=1, biases=("qkv", "down")),
    TOKEN_MLP: dict(residual_scale=0.5, activation="gelu", biases=("t_gate_up", "t_down")),
}


@pytest.fixture(scope="module")
def from_ptx(tmp_path_factory: pytest.TempPathFactory) -> EmulatedCuda:
    # Host code and PTX of one small kernel.
    source = cuda_cases.owner_alone(tmp_path_factory.mktemp("ptx"), "X(64, 2, kShared)").source
    ptx = [
        toolchain.nvcc_compile(file, "80", to="ptx").cubin.read_text()
        for file in (source, KERNELS / FILES[1])
    ]
    return EmulatedCuda(load_ptx(ptx, [source, *FILES[1:]]), PLANS, DEVICES["a100"])


@pytest.mark.parametrize("kind, fields", [*((kind, {}) for kind in KINDS), *VARIED.items()])
def test_nvcc_ptx(from_ptx: EmulatedCuda, kind: str, fields: dict) -> None:
    schedule = Schedule.trm(1, 1)
    nets = {"L": make_net(kind, tokens=17, blocks=1, **fields)}
    from_ptx.emulated.reset_stats()
    teacher_forced(from_ptx, schedule, nets, torch.bfloat16, tokens=17, hidden=64, heads=2)
    assert from_ptx.emulated.stat("flop") > 0, "the C++ ran in the place of the PTX"
    x, carry = make_inputs(schedule, batch=2, tokens=17, dtype=torch.bfloat16)
    whole = from_ptx(schedule, nets, x, carry, rope(17))
    assert torch.equal(whole["z_H"], from_ptx(schedule, nets, x, carry, rope(17))["z_H"])
