"""Plans of the owner kernel: what is compiled, what fits a device, and why the rest is refused."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from emulator.build import KERNELS
from recurx import Schedule, Step
from recurx.plan import DEVICES
from recurx.plan import cuda as plan
from tests.factories import make_inputs, make_net, problem_for

ONE_CALL = Schedule((Step("L", "z_L", ("z_L",), ("z_H", "x")),))
BF16 = torch.bfloat16
OWNER = ("owner",)


def test_the_compiled_kernels_are_those_that_plans_know() -> None:
    text = (KERNELS / "owner_sm80" / "launch.cu").read_text()
    listed = re.search(r"#ifndef RX_OWNER_PLANS(.*?)#endif", text, re.DOTALL)[1]
    found = re.findall(r"X\((\d+), (\d+), k(\w+)\)", listed)
    places = {"Shared": (), "Scratch": (1,)}
    assert tuple((int(a), int(b), *places[c]) for a, b, c in found) == plan.OWNER_PLANS


@pytest.mark.parametrize("name", DEVICES)
def test_shared_memory_is_within_the_device(name: str) -> None:
    device = DEVICES[name]
    net = make_net(tokens=97, hidden=512, heads=8, inner=1536)
    x, _ = make_inputs(ONE_CALL, batch=64, tokens=97, hidden=512, dtype=BF16)
    problem = dataclasses.replace(problem_for(ONE_CALL, {"L": net}, x), device_type="cuda")
    plans = plan.candidates(problem, device, kinds=OWNER)
    assert plans and all(p["shared_bytes"] <= device.shared_bytes for p in plans)
    fits = device.shared_bytes >= 166336
    assert all(p["in_scratch"] == (not fits) for p in plans)
    in_shared = tuple(shape for shape in plan.OWNER_PLANS if len(shape) == 2)
    if not fits:  # without the kernels that keep h in scratch
        (reason,) = plan.refusals(problem, device, in_shared, kinds=OWNER)
        assert "needs 166336 bytes of shared memory for T=97, D=512" in reason


# ---- refusals: before anything is launched ----------------------------------------------------


def problem(**changes: object):  # type: ignore[no-untyped-def]
    net = make_net()
    x, _ = make_inputs(ONE_CALL, batch=1, dtype=BF16)
    made = dataclasses.replace(problem_for(ONE_CALL, {"L": net}, x), device_type="cuda")
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize(
    "changes, device, reason",
    [
        (dict(dtype=torch.float32), "h100", r"runs bfloat16 states, not torch\.float32"),
        (dict(tokens=129), "h100", r"keeps up to T=128 tokens in a CTA, got T=129"),
        (dict(hidden=96), "h100", r"compiled for D in \[64, 128, 256, 384, 512\], got D=96"),
        (dict(opaque=("L",)), "h100", r"cannot look inside the plain callable 'L'"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    changes: dict, device: str, reason: str
) -> None:
    found = plan.refusals(problem(**changes), DEVICES[device], kinds=OWNER)
    assert len(found) == 1 and re.search(reason, found[0])
    assert plan.candidates(problem(**changes), DEVICES[device], kinds=OWNER) == []


def test_old_devices_and_head_sizes_are_refused() -> None:
    old = dataclasses.replace(DEVICES["a100"], name="t4", capability=(7, 5))
    assert "needs compute capability 8.0" in plan.refusals(problem(), old)[0]
    net = make_net(heads=4)  # head_dim 16
    x, _ = make_inputs(ONE_CALL, batch=1, dtype=BF16)
    p = dataclasses.replace(problem_for(ONE_CALL, {"L": net}, x), device_type="cuda")
    assert "head_dim in (32, 64, 128), net 'L' has 16" in plan.refusals(p, DEVICES["a100"])[0]
