"""The grid kernel's plan: what fits, what it is made of, and that it is the least of its kind."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch

from recurx import Schedule
from recurx.nets import ATTENTION, TOKEN_MLP, BlockSpec, NetSpec
from recurx.plan import DEVICES, cuda_grid
from recurx.problem import Problem

ATT = NetSpec((BlockSpec(ATTENTION, 512, 1536, num_heads=8),) * 2)
MLP = NetSpec((BlockSpec(TOKEN_MLP, 512, 1536, tokens=97, token_inner=512),) * 2)
GPUS = sorted(DEVICES)


def problem(spec: NetSpec = ATT, batch: int = 1, tokens: int = 97) -> Problem:
    nets = (("L", spec),)
    return Problem(
        Schedule.trm(3, 6), nets, batch, tokens, spec.hidden, torch.bfloat16, "cuda", True
    )


def plan_of(asked: Problem, device: str):
    (plan,) = cuda_grid.grid_plans(asked, DEVICES[device])
    return plan


@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("spec", [ATT, MLP], ids=["attention", "token_mlp"])
def test_one_cta_a_multiprocessor_within_its_shared_memory(device, spec):
    plan = plan_of(problem(spec), device)
    assert DEVICES[device].units - plan["cluster"] < plan["ctas"] <= DEVICES[device].units
    assert plan["ctas"] % plan["cluster"] == 0
    assert plan["shared_bytes"] <= DEVICES[device].shared_bytes
    assert 0 < cuda_grid.FIXED < plan["shared_bytes"]


def test_stages_are_those_of_the_blocks():
    """Enter, and five stages a block; a token-MLP that is not first is turned to before."""
    assert plan_of(problem(ATT), "h100")["stages"] == 21 * (1 + 2 * 5)
    assert plan_of(problem(MLP), "h100")["stages"] == 21 * (1 + 2 * 5 + 1)


@pytest.mark.parametrize(
    "sizes, free, staged, kept",
    [
        ([3, 2, 2], 7, False, [True, True, True]),
        ([2, 3, 2], 6, True, [True, False, False]),
        ([2, 3, 2], 5, True, [True, False, False]),
        ([2, 3, 2], 4, True, [False, False, False]),
        ([2, 3, 1], 2, False, [True, False, False]),  # read from L2 where it is used
    ],
)
def test_what_does_not_fit_takes_turns_in_a_place_set_aside(sizes, free, staged, kept):
    assert cuda_grid._kept(sizes, free) == (staged, kept)


def test_weights_come_in_behind_half_of_the_waits_at_most():
    """A device whose L2 is slow waits as before for what is left, and never less than that."""
    h100 = DEVICES["h100"]
    plans = [plan_of(problem(), "h100")]
    plans += cuda_grid.grid_plans(problem(), replace(h100, name="slow", l2_gbs=h100.l2_gbs / 50))
    whole = 231 * (cuda_grid.HANDOVER + cuda_grid.FIRST_LOAD)
    assert whole / 2 < plans[0].work.barriers < whole
    assert plans[1].work.barriers >= whole * (1 - cuda_grid.HIDDEN) * (1 - 1e-9)


def test_time_grows_with_the_batch_and_falls_with_the_device():
    for spec in (ATT, MLP):
        times = {
            device: [plan_of(problem(spec, b), device).seconds(DEVICES[device]) for b in (1, 2, 8)]
            for device in ("l4", "a100", "h100")
        }
        for device in times:
            assert times[device] == sorted(times[device])
        assert times["h100"][0] < times["a100"][0] < times["l4"][0]


@pytest.mark.parametrize(
    "device, cuts", [("h100", [(132, 1), (132, 2), (124, 4), (120, 8)]), ("l4", [(58, 1)])]
)
def test_no_other_groups_are_predicted_faster(device, cuts):
    """All combinations, each through the whole cost model instead of the search's shortcut."""
    asked, found = problem(ATT), plan_of(problem(ATT), device)
    blocks = [cuda_grid.products_of(block, 1, 97) for block in ATT.blocks]
    others = [
        cuda_grid._plan(asked, DEVICES[device], blocks, cut, groups)
        for groups in itertools.product((1, 2, 4), repeat=4)
        for cut in cuts
    ]
    best = min(plan.seconds(DEVICES[device]) for plan in others)
    assert found.seconds(DEVICES[device]) <= best * (1 + 1e-9)


@pytest.mark.parametrize("device", GPUS)
def test_clusters_are_hoppers_alone(device):
    plan = plan_of(problem(batch=8), device)
    assert (plan["cluster"] > 1) == (device in ("h100", "h200", "gh200"))


def test_a_cluster_is_as_large_as_the_driver_has_place_for():
    """With 32 clusters of 4 a product has no more units a CTA than without; with 31 one has."""
    h100 = DEVICES["h100"]
    found = [
        cuda_grid.grid_plans(problem(), replace(h100, clusters=((512, 2, 66), (512, 4, four))))[0]
        for four in (32, 31)
    ]
    assert [(plan["ctas"], plan["cluster"]) for plan in found] == [(128, 4), (132, 2)]
    assert "4 CTAs get rows at once" in found[0].why
    few = cuda_grid.grid_plans(problem(), replace(h100, name="few", units=1))
    assert [plan["cluster"] for plan in few] == [1]


@pytest.mark.parametrize("cluster, share", [(1, 1.0), (2, 1 / 2), (4, 0.356), (8, 0.356)])
def test_a_multiprocessor_takes_in_64_bytes_a_clock(cluster, share):
    (product, *_) = cuda_grid.products_of(ATT.blocks[0], 1, 97)
    rows = cuda_grid.Share(product, 128, cluster, 1)
    traffic = cuda_grid._row_traffic(rows, DEVICES["h100"])
    assert traffic == pytest.approx(share * rows.row_bytes, rel=1e-3)


def test_a_ring_takes_the_place_of_weights():
    blocks = [cuda_grid.products_of(block, 1, 97) for block in ATT.blocks]
    alone, two = (cuda_grid.fixed_shared_bytes(blocks, (132, c), (4, 4, 2, 4)) for c in (1, 2))
    assert two - alone == cuda_grid.RINGS
    kept = [
        re.search(
            r"keep (\d+) of their (\d+) KB",
            cuda_grid._best(problem(), DEVICES["h100"], blocks, (132, c)).why,
        ).groups()
        for c in (1, 2)
    ]
    assert kept == [("128", "320"), ("80", "320")]


def test_a_larger_shared_memory_never_costs_time():
    h100 = DEVICES["h100"]
    small = replace(h100, name="small", shared_bytes=64 * 1024)
    (less,) = cuda_grid.grid_plans(problem(), small)
    assert plan_of(problem(), "h100").seconds(h100) < less.seconds(small)


@pytest.mark.parametrize(
    "asked, reason",
    [
        (problem(tokens=129), "up to T=128 tokens, got T=129"),
        (problem(batch=17), "up to 16 samples at once, got B=17"),
        (problem(NetSpec((BlockSpec(ATTENTION, 80, 96, num_heads=5),))), "multiple of 32.*D=80"),
        (problem(NetSpec((BlockSpec(ATTENTION, 512, 96, num_heads=2),))), "head_dim .* has 256"),
    ],
    ids=["tokens", "batch", "hidden", "heads"],
)
def test_what_does_not_fit_is_refused_with_a_reason(asked, reason):

    assert cuda_grid.grid_plans(asked, DEVICES["h100"]) == ()
    assert re.search(reason, cuda_grid.why_not_grid(asked, DEVICES["h100"]))
