"""backend="cuda", the cluster kernel, in the emulator: numerics, plans and refusals."""

from __future__ import annotations

import ctypes
import dataclasses
import re

import pytest
import torch

import recurx
from emulator.build import load_kernels, unavailable
from emulator.cluster_recursion import FILES
from emulator.owner import installed
from recurx.backends.cuda import Cuda
from recurx.nets import ATTENTION, KINDS, TOKEN_MLP
from recurx.plan import DEVICES, cuda, cuda_cluster
from recurx.schedule import Schedule, Step
from tests.factories import make_inputs, make_net, problem_for, rope
from tests.test_numerics import SYSTEMS, teacher_forced

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

SMALL = dict(tokens=33, hidden=128, heads=2, inner=200, token_inner=64)
PUBLISHED = dict(tokens=97, hidden=512, heads=8, inner=1536, token_inner=512)
ONE_CALL = Schedule((Step("L", "z_L", ("z_L",), ("z_H", "x")),))
BF16 = torch.bfloat16
CLUSTER = ("cluster",)


@pytest.fixture(scope="module")
def backend():
    """The real backend over a build that holds the cluster kernel alone; no race checker."""
    emulated = load_kernels(FILES, checked=False)
    cuda = Cuda(emulated.library, DEVICES["h100"])
    cuda.emulated = emulated  # keeps it alive
    with installed(cuda):
        yield cuda


def recurse(*arguments, **named):
    return recurx.recurse(*arguments, backend="cuda", **named)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_call_teacher_forced(backend, system, kind):
    schedule = SYSTEMS[system]
    nets = {name: make_net(kind, seed=seed, **SMALL) for seed, name in enumerate(schedule.nets)}
    teacher_forced(recurse, schedule, nets, BF16, **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_call_of_the_published_size(backend, kind):
    teacher_forced(recurse, ONE_CALL, {"L": make_net(kind, **PUBLISHED)}, BF16, **PUBLISHED)


@pytest.mark.parametrize("kind", KINDS)
def test_one_launch_has_the_bits_of_its_calls_and_of_a_rerun(backend, kind):
    schedule, nets = Schedule.trm(1, 2), {"L": make_net(kind, blocks=1, **SMALL)}
    x, carry = make_inputs(schedule, batch=3, tokens=33, hidden=128, dtype=BF16)
    tables = rope(33, 128, 2)
    packed = len(backend.tapes)
    whole = recurse(schedule, nets, x, carry, cos_sin=tables)
    again = recurse(schedule, nets, x, carry, cos_sin=tables)
    assert len(backend.tapes) == packed + 1
    one_by_one = carry
    for k in range(len(schedule)):
        one = dict(start_from=k, stop_after=k + 1)
        one_by_one = recurse(schedule, nets, x, one_by_one, cos_sin=tables, **one)
    for name in schedule.states:
        assert torch.equal(whole[name], again[name])
        assert torch.equal(whole[name], one_by_one[name]), name


# ---- plans


def problem(kind=ATTENTION, batch=64, **changes):
    size = PUBLISHED | changes
    net = make_net(kind, **size)
    shape = dict(tokens=size["tokens"], hidden=size["hidden"])
    x, _ = make_inputs(ONE_CALL, batch=batch, dtype=BF16, **shape)
    return dataclasses.replace(problem_for(ONE_CALL, {"L": net}, x), device_type="cuda")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", cuda_cluster.WIDTHS)
def test_the_plan_counts_the_tape_as_the_kernel_does(backend, hidden, kind):
    from recurx.backends.cuda_abi import RxPack
    from recurx.backends.cuda_launch import blocks

    size = dict(tokens=70, hidden=hidden, heads=hidden // 64, inner=200, token_inner=100)
    spec = make_net(kind, blocks=1, **size).spec
    pack = RxPack(hidden, 70, 1)
    pack.blocks[:1] = blocks(spec)
    counted = backend.library().bytes_of("rx_cluster_sm90a_tape_bytes", pack)
    assert counted == cuda_cluster.block_stages(spec.blocks[0]) * cuda_cluster.STAGE


def test_clusters_are_as_large_as_the_batch_fills():
    for batch, clusters in ((1, [2]), (2, [2, 4]), (64, [2, 4, 8])):
        plans = cuda_cluster.cluster_plans(problem(batch=batch), DEVICES["h100"])
        assert [plan["cluster"] for plan in plans] == clusters


def test_more_samples_than_fit_take_another_round():
    """64 samples fill 32 clusters of 4; one more needs a second round."""
    hidden = problem().hidden
    h100 = dataclasses.replace(DEVICES["h100"], clusters=((hidden, 4, 32),))
    plans = [
        {p["cluster"]: p for p in cuda_cluster.cluster_plans(problem(batch=b), h100)}[4]
        for b in (64, 65)
    ]
    one, two = (plan.seconds(h100) for plan in plans)
    assert 1.9 < two / one < 2.1
    assert "33 clusters in 2 rounds" in str(plans[1])


def test_an_emulated_gpu_does_not_say_how_many_clusters_it_runs(backend):
    places, count = backend.emulated.library.rx_cluster_sm90a_places, ctypes.c_int32(7)
    assert places(128, 4, ctypes.byref(count)) == 0 and count.value == 0
    assert places(96, 4, ctypes.byref(count)) != 0  # no kernel is that wide


def test_wider_clusters_read_less():
    plans = cuda_cluster.cluster_plans(problem(), DEVICES["h100"])
    moved = [plan.work.l2_bytes for plan in plans]
    assert moved == sorted(moved, reverse=True)


@pytest.mark.parametrize(
    "changes, device, reason",
    [
        ({}, "a100", "cluster: is Hopper's alone .*a100 has 8.0"),
        ({}, "b200", "cluster: is Hopper's alone .*b200 has 10.0"),
        (dict(hidden=64, heads=1), "h100", r"compiled for D in \[128, 256, 384, 512\], got D=64"),
        (dict(tokens=129), "h100", "up to T=128 tokens in two CTAs, got T=129"),
        (dict(heads=16), "h100", "needs head_dim 64, net 'L' has 32"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(changes, device, reason):
    found = cuda.refusals(problem(**changes), DEVICES[device], kinds=CLUSTER)
    assert len(found) == 1 and re.search(reason, found[0]), found
    assert cuda.candidates(problem(**changes), DEVICES[device], kinds=CLUSTER) == []


def test_a_token_mlp_needs_no_heads():
    assert cuda_cluster.why_not_cluster(problem(TOKEN_MLP, heads=1), DEVICES["h100"]) is None
