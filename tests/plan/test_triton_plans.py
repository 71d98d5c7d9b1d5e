"""recurx/plan/triton.py: what fits, what is refused and why, and what is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recurx import Problem, Schedule
from recurx.nets import ATTENTION, TOKEN_MLP, BlockSpec, NetSpec
from recurx.operands import Span
from recurx.plan import DEVICES, Device, LaunchPlan
from recurx.plan.count import flops
from recurx.plan.triton import MAX_SLICE, candidates, refusals, sample_bytes
from recurx.program import lower

H100 = DEVICES["h100"]


def problem(
    batch=512, tokens=97, hidden=512, heads=8, inner=1536, dtype=torch.bfloat16, kind=ATTENTION
) -> Problem:
    block = BlockSpec(ATTENTION, hidden, inner, num_heads=heads)
    if kind == TOKEN_MLP:
        block = BlockSpec(TOKEN_MLP, hidden, inner, tokens=tokens, token_inner=512)
    nets = (("L", NetSpec((block, block))),)
    return Problem(Schedule.trm(3, 6), nets, batch, tokens, hidden, dtype, "cuda", rope=True)


SMALL = dict(tokens=17, hidden=64, heads=2, inner=256)


def kinds(found: list[LaunchPlan]) -> set[str]:
    return {plan.kind for plan in found}


def picked(wanted: Problem, device: Device) -> LaunchPlan:
    return LaunchPlan.pick(wanted, device, "triton/tiled")


def resident(wanted: Problem, device: Device) -> LaunchPlan:
    """The largest slice that stays in L2."""
    kept = [p for p in candidates(wanted, device) if "kept in L2" in p.why]
    return max(kept, key=lambda plan: plan["slice"])


def test_slices_that_are_said_to_stay_in_l2_fit_it():
    program = lower(Schedule.trm(3, 6), Span(0, 21))
    plan = resident(problem(), H100)
    assert 0.6 * H100.l2_bytes < 13.6e6 + plan["slice"] * sample_bytes(problem(), program)
    assert 13.6e6 + plan["slice"] * sample_bytes(problem(), program) < 0.75 * H100.l2_bytes
    smaller = resident(problem(), replace(H100, l2_bytes=H100.l2_bytes * 3 // 4))
    assert smaller["slice"] < plan["slice"]


def test_what_leaves_l2_is_counted_as_dram_traffic_and_avoided_where_that_is_slow():
    whole = next(p for p in candidates(problem(), H100) if p["slice"] == MAX_SLICE)
    kept = resident(problem(), H100)
    assert "more than L2" in whole.why
    assert whole.work.dram_bytes > 20 * kept.work.dram_bytes
    slow = replace(H100, dram_gbs=300)
    assert picked(problem(), slow).work.dram_bytes < whole.work.dram_bytes / 10


def test_few_programs_wait_for_their_own_share_of_l2():
    """O and down run on one multiprocessor at B = 1: as its products, or as what it reads."""
    fast = replace(H100, l2_gbs=1e9)
    one, all_of_it = (picked(problem(batch=1), d).work.padded_flops for d in (H100, fast))
    assert 1.1 < one / all_of_it < 3
    many, unlimited = (picked(problem(batch=64), d).work.padded_flops for d in (H100, fast))
    assert 1 < many / unlimited < one / all_of_it * 1.5


def test_weights_beyond_l2_are_read_again_at_each_call():
    """HRM: 54 MB of weights. Slices must not shrink to make room for what has none anyway."""
    block = BlockSpec(ATTENTION, 512, 1536, num_heads=8)
    nets = tuple((name, NetSpec((block,) * 4)) for name in ("L", "H"))
    wanted = Problem(Schedule.hrm(2, 2), nets, 64, 82, 512, torch.bfloat16, "cuda", rope=True)
    plan = picked(wanted, H100)
    one_net = 4 * sum(a * b for a, b in block.weight_shapes) * 2
    slices = -(-64 // plan["slice"])
    assert plan["slice"] >= 16
    assert plan.work.dram_bytes > 6 * one_net * slices


def test_launches_are_counted_kernel_by_kernel():
    """21 calls of 2 blocks of 5 kernels, 21 sums, 3 kept sums (z_H + x, a cycle), 2 copies."""
    for kind, tiled in ((ATTENTION, 5), (TOKEN_MLP, 4)):
        for way, block in (("tiled", tiled), ("library", 8)):
            plan = LaunchPlan.pick(problem(batch=1, kind=kind), H100, f"triton/{way}")
            assert plan.kind == way and plan.work.launches == 21 * 2 * block + 21 + 3 + 2


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("kind", [ATTENTION, TOKEN_MLP])
@pytest.mark.parametrize("batch", [1, 64, 512])
def test_padding_is_counted_on_top(batch, kind, device):
    for shape in ({}, SMALL):
        wanted = problem(batch=batch, kind=kind, **shape)
        for plan in candidates(wanted, device):
            assert plan.work.flops == flops(wanted)
            # Elementwise work is in flops but not in the tiles' products: at most a tenth.
            assert plan.work.padded_flops > 0.9 * plan.work.flops
            assert 0 < plan.seconds(device) < 60


def test_persistent_is_for_small_nets_and_says_so():
    assert kinds(candidates(problem(**SMALL), H100)) == {"tiled", "library", "persistent"}
    assert kinds(candidates(problem(), H100)) == {"tiled", "library"}
    (reason,) = refusals(problem(), H100)
    assert "D=512" in reason and "persistent" in reason
    (reason,) = refusals(problem(**{**SMALL, "tokens": 129}), H100)
    assert "T=129" in reason
    (reason,) = refusals(problem(tokens=97, hidden=256, heads=4, inner=768), H100)
    assert "do not fit" in reason
    mixed = BlockSpec(ATTENTION, 64, 256, num_heads=2), BlockSpec(ATTENTION, 64, 256, num_heads=1)
    several = replace(problem(**SMALL), nets=(("L", NetSpec(mixed)),))
    assert "differ" in refusals(several, H100)[0]
    assert refusals(problem(**SMALL), H100) == []


def test_the_library_takes_rows_that_no_tile_holds():
    wide = problem(hidden=2048, heads=32, inner=6144)
    assert kinds(candidates(wide, H100)) == {"library"}
    assert "tiled: a program holds rows of at most 1024" in "; ".join(refusals(wide, H100))
    long = problem(tokens=1500, kind=TOKEN_MLP)
    assert kinds(candidates(long, H100)) == {"library"}


def test_samples_share_a_program_only_where_rows_do_not_mix():
    groups = {p["group"] for p in candidates(problem(**SMALL), H100) if p.kind == "persistent"}
    assert groups == {1, 3, 7}
    mlp = candidates(problem(kind=TOKEN_MLP, **SMALL), H100)
    assert {p["group"] for p in mlp if p.kind == "persistent"} == {1}


@pytest.mark.parametrize("kind", [ATTENTION, TOKEN_MLP])
def test_a_program_has_room_for_its_samples(kind):
    for tokens in (1, 17, 32, 33, 64, 97, 128):
        wanted = problem(kind=kind, **{**SMALL, "tokens": tokens})
        found = [p for p in candidates(wanted, H100) if p.kind == "persistent"]
        assert found and all(p["rows"] >= p["group"] * tokens for p in found)


def test_one_sample_of_a_small_net_goes_persistent():
    """63 kernels and more of a microsecond each, against one that is far from busy."""
    assert LaunchPlan.pick(problem(batch=1, **SMALL), H100, "triton").kind == "persistent"


def test_nothing_for_other_devices_and_empty_batches():
    assert candidates(problem(batch=0), H100) == []
    assert "empty" in refusals(problem(batch=0), H100)[0]
    cpu = Device("c", "cpu", (0, 0), 2, 0, 0, 1, 1, 1, 1, 1, 1, 1)
    assert candidates(problem(), cpu) == [] and "does not run on" in refusals(problem(), cpu)[0]
