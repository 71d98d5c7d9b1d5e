"""The cluster kernel on a Hopper: numerics at full size, reruns, the same bits in any cluster."""

from __future__ import annotations

import pytest
import torch

import recurx
from emulator.owner import installed
from recurx import Schedule
from recurx.backends.cuda import Cuda
from recurx.nets import KINDS, Net
from recurx.plan import Device
from recurx.plan.cuda_cluster import CLUSTERS, cluster_plans
from tests.factories import make_inputs, make_net, rope
from tests.test_numerics import SYSTEMS, teacher_forced

pytestmark = pytest.mark.gpu
PUBLISHED = dict(tokens=97, hidden=512, inner=1536, heads=8, token_inner=512)
SHAPE = dict(tokens=97, hidden=512)


class ClusterAlone(Cuda):
    """The backend with no kernel but this one, and one size of cluster if `cluster` says so."""

    cluster: int | None = None

    def _kinds(self) -> tuple[str, ...]:
        return ("cluster",)

    def plan(self, problem, device=None):
        if self.cluster is None:
            return super().plan(problem, device)
        (plan,) = [
            plan
            for plan in cluster_plans(problem, Device.of(device or "cuda"))
            if plan["cluster"] == self.cluster
        ]
        return plan


@pytest.fixture
def backend():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this kernel runs on compute capability 9.0")
    cuda = ClusterAlone()
    if cuda.why_unavailable():
        pytest.skip(cuda.why_unavailable())
    with installed(cuda):
        yield cuda


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
def test_every_call_teacher_forced(backend, system, kind):
    schedule = SYSTEMS[system]
    nets = {n: make_net(kind, seed=seed, **PUBLISHED) for seed, n in enumerate(schedule.nets)}
    teacher_forced(recurse, schedule, nets, torch.bfloat16, **PUBLISHED)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3, 64, 200])
def test_reruns_and_clusters_give_the_same_bits(backend, kind, batch):
    schedule, nets = Schedule.trm(3, 6), on_device({"L": make_net(kind, **PUBLISHED)})
    x, carry = make_inputs(schedule, batch=batch, dtype=torch.bfloat16, **SHAPE)
    x, carry = x.cuda(), {name: state.cuda() for name, state in carry.items()}
    tables = tuple(table.cuda() for table in rope(97, 512, 8))

    def run():
        return recurx.recurse(schedule, nets, x, carry, backend="cuda", cos_sin=tables)

    first = run()
    for cluster in CLUSTERS:
        if cluster > 2 and cluster > 2 * batch:
            continue
        backend.cluster = cluster
        for rerun in range(100):
            for name, state in run().items():
                assert torch.equal(first[name], state), f"cluster {cluster}, rerun {rerun}: {name}"
