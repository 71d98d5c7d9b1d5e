"""backend="triton" on the hardware: the numerics of tests/kernels, graphs, captures, both plans."""

from __future__ import annotations

import pytest
import torch
from device_sizes import PUBLISHED, waves

import recurx
from bench.gpu_check.families import Family, held
from recurx import Schedule, Step
from recurx.backends import triton as backend
from recurx.bench.host import TRITON_KINDS
from recurx.nets import ATTENTION, KINDS, Net
from tests.factories import make_inputs, make_net, rope
from tests.test_numerics import SYSTEMS, teacher_forced

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float32)
SMALL = dict(tokens=33, hidden=64, inner=256, heads=2, token_inner=128)
ONE_CALL = Schedule((Step("L", "z_L", ("z_L",), ("z_H", "x")),))


@pytest.fixture(params=[kind for kind in TRITON_KINDS if kind != "graph"])
def plan(request):
    """Hold the backend to one kind of plan."""
    backend.BACKEND.free()
    with held(Family("triton", request.param)):
        yield request.param


def on_gpu(net: Net) -> Net:
    return Net(net.spec, [weight.cuda() for weight in net.weights])


def run(schedule, nets, x, carry, cos_sin=None, **keywords):
    """On the device, from and to the CPU, so that the CPU's checks judge it."""
    out = recurx.recurse(
        schedule, {name: on_gpu(net) for name, net in nets.items()}, x.cuda(),
        {name: state.cuda() for name, state in carry.items()}, backend="triton",
        cos_sin=None if cos_sin is None else tuple(t.cuda() for t in cos_sin), **keywords,
    )  # fmt: skip
    return {name: state.cpu() for name, state in out.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_call_teacher_forced(system, kind, dtype, plan):
    schedule = SYSTEMS[system]
    nets = {n: make_net(kind, seed=s, **SMALL) for s, n in enumerate(schedule.nets)}
    teacher_forced(run, schedule, nets, dtype, **SMALL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_call_at_the_published_size(kind, dtype):
    teacher_forced(run, ONE_CALL, {"L": make_net(kind, **PUBLISHED)}, dtype, **PUBLISHED)


def case(batch, shape=SMALL, kind=ATTENTION):
    size = {k: shape[k] for k in ("tokens", "hidden")}
    x, carry = make_inputs(Schedule.trm(2, 3), batch=batch, dtype=torch.bfloat16, **size)
    tables = rope(heads=shape["heads"], **size)
    net = on_gpu(make_net(kind, **shape))
    on_device = {name: state.cuda() for name, state in carry.items()}
    return net, x.cuda(), on_device, tuple(table.cuda() for table in tables)


def recurse(net, x, carry, tables):
    return recurx.recurse(
        Schedule.trm(2, 3), {"L": net}, x, carry, backend="triton", cos_sin=tables
    )


@pytest.mark.parametrize("kind", KINDS)
def test_replays_are_bit_equal_and_see_new_weights(kind, plan):
    net, x, carry, tables = case(batch=waves(2.2), kind=kind)
    first = recurse(net, x, carry, tables)
    for _ in range(4):  # plain, captured, replayed
        again = recurse(net, x, carry, tables)
        assert all(torch.equal(first[name], again[name]) for name in first)
    with torch.no_grad():
        net.weights[0].mul_(1.5)
    after = recurse(net, x, carry, tables)
    moved = Net(net.spec, [weight.clone() for weight in net.weights])
    want = recurse(moved, x, carry, tables)
    assert all(torch.equal(after[name], want[name]) for name in first)
    assert not torch.equal(after["z_H"], first["z_H"])


def test_inside_a_graph_of_the_caller(plan):
    net, x, carry, tables = case(batch=5)
    want = recurse(net, x, carry, tables)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = recurse(net, x, carry, tables)
    backend.BACKEND.free()  # the graph must not depend on what the backend keeps
    with torch.no_grad():
        net.weights[0].data.mul_(1.5)  # a replay rounds the weights anew
    graph.replay()
    assert not torch.equal(out["z_H"], want["z_H"])
    want = recurse(net, x, carry, tables)
    assert all(torch.equal(out[name], want[name]) for name in want)


def test_under_torch_compile():
    net, x, carry, tables = case(batch=3)
    with torch.no_grad():
        want = recurse(net, x, carry, tables)["z_H"]
        got = torch.compile(lambda *a: recurse(net, *a)["z_H"], fullgraph=True)(x, carry, tables)
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_streams_of_the_caller_do_not_meet(kind, plan):
    """Graphs that run side by side: buffers, tapes and cuBLAS's workspace are each stream's own."""
    cases = [case(batch=batch, kind=kind) for batch in (64, 65)]
    wants = [recurse(*given) for given in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(20):
        outs = []
        for stream, given in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                outs.append(recurse(*given))
        torch.cuda.synchronize()
        for out, want in zip(outs, wants, strict=True):
            assert all(torch.equal(out[name], want[name]) for name in want)
