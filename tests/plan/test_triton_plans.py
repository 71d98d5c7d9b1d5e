"""recurx/plan/triton.py: what fits, what is refused and why, and what is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recurx import Problem, Schedule
from recurx.nets import ATTENTION, TOKEN_MLP, BlockSpec, NetSpec
from recurx.plan import DEVICES, Device, LaunchPlan
from recurx.plan.count import flops
from recurx.plan.triton import candidates, refusals, sample_bytes

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


def test_slices_keep_their_activations_in_l2():
    for plan in candidates(problem(), H100):
        held = plan["slice"] * sample_bytes(problem(), _table())
        assert held < H100.l2_bytes and plan.backend == "triton"
    smaller = replace(H100, l2_bytes=H100.l2_bytes // 2)
    largest = max(plan["slice"] for plan in candidates(problem(), H100))
    assert max(plan["slice"] for plan in candidates(problem(), smaller)) < largest


def _table():
    from recurx.backends.calls import lower

    return lower(Schedule.trm(3, 6), 0, 21)


def test_launches_are_counted_kernel_by_kernel():
    """21 calls of 2 blocks of 5 kernels, 21 sums, 3 kept sums (z_H + x, a cycle), 2 copies."""
    (plan,) = [p for p in candidates(problem(batch=1), H100) if p.kind == "tiled"]
    assert plan.work.launches == 21 * 2 * 5 + 21 + 3 + 2
    mlp = next(p for p in candidates(problem(batch=1, kind=TOKEN_MLP), H100))
    assert mlp.work.launches == 21 * 2 * 4 + 21 + 3 + 2


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
    assert kinds(candidates(problem(**SMALL), H100)) == {"tiled", "persistent"}
    assert kinds(candidates(problem(), H100)) == {"tiled"}
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
