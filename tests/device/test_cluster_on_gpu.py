"""The cluster kernel on a Hopper: numerics at full size, reruns, the same bits in any cluster."""

from __future__ import annotations

import pytest
import torch
from device_sizes import PUBLISHED, RERUNS, SHAPE, waves

import recurx
from bench.gpu_check.families import FAMILIES, held
from recurx import Schedule, backends
from recurx.nets import KINDS, Net
from recurx.plan.cuda_cluster import CLUSTERS
from tests.factories import make_inputs, make_net, rope
from tests.test_numerics import SYSTEMS, teacher_forced

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this kernel runs on compute capability 9.0")
    reason = backends.get("cuda").why_unavailable()
    if reason:
        pytest.skip(reason)


def on_device(nets):
    return {name: Net(net.spec, [w.cuda() for w in net.weights]) for name, net in nets.items()}


def recurse(schedule, nets, x, carry, cos_sin, **named):
    carry = {name: state.cuda() for name, state in carry.items()}
    tables = tuple(table.cuda() for table in cos_sin)
    out = recurx.recurse(
        schedule, on_device(nets), x.cuda(), carry, backend="cuda", cos_sin=tables, **named
    )
    return {name: state.cpu() for name, state in out.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_call_teacher_forced(system, kind):
    schedule = SYSTEMS[system]
    nets = {n: make_net(kind, seed=seed, **PUBLISHED) for seed, n in enumerate(schedule.nets)}
    with held(FAMILIES["cluster-2"]):
        teacher_forced(recurse, schedule, nets, torch.bfloat16, **PUBLISHED)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0, 0.03, 0.5, 1.5])  # samples for each multiprocessor
def test_reruns_and_clusters_give_the_same_bits(kind, share):
    schedule, nets = Schedule.trm(3, 6), on_device({"L": make_net(kind, **PUBLISHED)})
    batch = waves(share)
    x, carry = make_inputs(schedule, batch=batch, dtype=torch.bfloat16, **SHAPE)
    x, carry = x.cuda(), {name: state.cuda() for name, state in carry.items()}
    tables = tuple(table.cuda() for table in rope(**SHAPE, heads=PUBLISHED["heads"]))
    first = None
    for cluster in CLUSTERS:
        if cluster > 2 and cluster > batch:  # two short samples share two CTAs
            continue
        with held(FAMILIES[f"cluster-{cluster}"]):
            for rerun in range(min(RERUNS, 100)):
                out = recurx.recurse(schedule, nets, x, carry, backend="cuda", cos_sin=tables)
                first = first or out
                for name, state in out.items():
                    assert torch.equal(first[name], state), f"cluster {cluster}, {rerun}: {name}"
