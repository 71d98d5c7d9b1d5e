"""The grid kernel on the hardware: the emulator's numerics at full size, and many reruns."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from device_sizes import PUBLISHED, RERUNS, SHAPE, SMALL
from nvcc_library import KERNELS, call, library

from aot import toolchain
from emulator.grid import FILES, GridKernel, Plan
from recurx import Schedule, reference
from recurx.nets import KINDS, Net
from recurx.plan import Device, cuda_grid
from recurx.plan.cuda_cluster import CLUSTERS, places
from tests.factories import make_inputs, make_net, problem_for, quantize_net, rope
from tests.kernels.compare import assert_as_exact
from tests.test_numerics import teacher_forced

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(toolchain.find_nvcc() is None, reason="nvcc is not here"),
]
TABLES = {**SHAPE, "heads": PUBLISHED["heads"]}


def on_device(schedule, nets, batch, shape, fp8=False) -> GridKernel:
    """The kernel, with the plan that recurx picks for this device."""
    major, minor = torch.cuda.get_device_capability()
    lib = library([KERNELS / name for name in FILES], f"{major}{minor}")
    entries = SimpleNamespace(
        library=lib,
        checked=False,
        unwatch_all=lambda: None,
        call=lambda entry, *arguments: call(lib, entry, *arguments),
    )
    x, _ = make_inputs(schedule, batch=batch, dtype=torch.bfloat16, **shape)
    problem = replace(problem_for(schedule, nets, x), device_type="cuda")
    (plan,) = cuda_grid.grid_plans(problem, Device.of("cuda"), fp8)
    return GridKernel(entries, Plan.of(plan))


@pytest.mark.parametrize("kind", KINDS)
def test_every_call_teacher_forced(kind):
    schedule, nets = Schedule.trm(1, 2), {"L": make_net(kind, **PUBLISHED)}
    kernel = on_device(schedule, nets, 2, SHAPE)

    def run(schedule, nets, x, carry, cos_sin=None, start_from=0, stop_after=None):
        carry = {name: state.cuda() for name, state in carry.items()}
        moved = {name: Net(net.spec, [w.cuda() for w in net.weights]) for name, net in nets.items()}
        tables = tuple(table.cuda() for table in cos_sin)
        out = kernel.run(schedule, moved, x.cuda(), carry, tables, start_from, stop_after)
        return {name: state.cpu() for name, state in out.items()}

    teacher_forced(run, schedule, nets, torch.bfloat16, **PUBLISHED)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2 if SMALL else 8])
def test_reruns_are_bit_equal(kind, batch):
    schedule = Schedule.trm(1, 1) if SMALL else Schedule.trm(3, 6)
    net = make_net(kind, **PUBLISHED)
    nets = {"L": Net(net.spec, [w.cuda() for w in net.weights])}
    kernel = on_device(schedule, nets, batch, SHAPE)
    x, carry = make_inputs(schedule, batch=batch, dtype=torch.bfloat16, **SHAPE)
    x, carry = x.cuda(), {name: state.cuda() for name, state in carry.items()}
    tables = tuple(table.cuda() for table in rope(**TABLES))
    first = kernel.run(schedule, nets, x, carry, tables)
    for rerun in range(RERUNS):
        again = kernel.run(schedule, nets, x, carry, tables)
        for name in first:
            assert torch.equal(first[name], again[name]), f"rerun {rerun}: {name} differs"


@pytest.mark.parametrize("kind", KINDS)
def test_clusters_give_the_bits_of_ctas_alone(kind):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("clusters are for compute capability 9.0")
    schedule, net, device = Schedule.trm(1, 1), make_net(kind, **PUBLISHED), Device.of("cuda")
    nets = {"L": Net(net.spec, [w.cuda() for w in net.weights])}
    kernel = on_device(schedule, nets, 1, SHAPE)
    x, carry = make_inputs(schedule, batch=1, dtype=torch.bfloat16, **SHAPE)
    x, carry = x.cuda(), {name: state.cuda() for name, state in carry.items()}
    tables = tuple(table.cuda() for table in rope(**TABLES))
    first = None
    for cluster in (1, *CLUSTERS):
        count = device.units // cluster
        if cluster > 1:
            count = min(count, places(device, SHAPE["hidden"], cluster))
        if not count:
            continue
        groups = tuple(min(count, g) for g in (4, 4, 2, 4))
        kernel.plan = replace(kernel.plan, ctas=count * cluster, row_groups=groups, cluster=cluster)
        out = kernel.run(schedule, nets, x, carry, tables)
        first = first or out
        for name in out:
            assert torch.equal(first[name], out[name]), f"clusters of {cluster}: {name} differs"


@pytest.mark.parametrize("kind", KINDS)
def test_fp8_against_fp64_with_the_dequantised_weights(kind):
    schedule = Schedule.single_z(1, 1)
    net = make_net(kind, **PUBLISHED)
    small = quantize_net(Net(net.spec, [w.cuda() for w in net.weights]))
    host = Net(net.spec, [w.cpu() for w in small.weights])
    exact_net = Net(net.spec, [w.double() for w in host.weights])
    x, carry = make_inputs(schedule, batch=1, dtype=torch.bfloat16, **SHAPE)
    tables = rope(**TABLES)
    states = {name: state.double() for name, state in carry.items()}
    exact = reference.run(schedule, {"L": exact_net}, x.double(), states, tables, 0, 1)
    plain = reference.run(schedule, {"L": host}, x, carry, tables, 0, 1)
    kernel = on_device(schedule, {"L": small}, 1, SHAPE, fp8=True)
    moved = {name: state.cuda() for name, state in carry.items()}
    got = kernel.run(schedule, {"L": small}, x.cuda(), moved, tuple(t.cuda() for t in tables), 0, 1)
    assert_as_exact(got["z"], plain["z"], exact["z"])
