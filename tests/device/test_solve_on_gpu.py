"""recurx.solve(backend="cuda") on a real GPU, against the loop on the host."""

import pytest
import torch
from device_sizes import SMALL, waves

import recurx
from recurx import tasks
from recurx.models import TRM
from recurx.models.config import TRMConfig
from recurx.solving import noise

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["attention", "tokens"])
def model(request):
    torch.manual_seed(0)
    make = TRMConfig.sudoku_att if request.param == "attention" else TRMConfig.sudoku_mlp
    small = dict(hidden_size=128, num_heads=2, puzzle_emb_ndim=128, H_cycles=1, L_cycles=1)
    made = TRM(make(**(small if SMALL else dict(puzzle_emb_ndim=512)))).cuda().eval()
    with torch.no_grad():
        made.inner.q_head.weight.normal_(std=0.05)
        made.inner.q_head.bias.zero_()
    return made


def puzzles(count):
    inputs = torch.randint(1, 11, (count, 81), dtype=torch.int32, device="cuda")
    return {"inputs": inputs, "puzzle_identifiers": torch.zeros_like(inputs[:, 0])}


def test_a_queue_longer_than_the_owners_gives_the_answers_of_the_loop(model):
    batch = puzzles(waves(3) + 4)
    inside = recurx.solve(model, batch, backend="cuda", max_steps=3)
    model.backend = "cuda"
    loop = recurx.solve(model, batch, max_steps=3)
    # Random weights: one rounding of q at the limit changes a sample's steps, so not all agree.
    same = (inside.steps == loop.steps) & (inside.predictions == loop.predictions).all(1)
    assert same.float().mean() > 0.97
    assert len(inside.histogram()) > 1


def test_rollouts_repeat_bit_for_bit_and_wait_for_nobody(model):
    batch = puzzles(40)
    arguments = dict(backend="cuda", max_steps=2, rollouts=4, sigma=0.2, seed=5, select="vote")
    first = recurx.solve(model, batch, **arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = recurx.solve(model, batch, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first.predictions, again.predictions) and torch.equal(first.q, again.q)


def test_random_starts_are_those_of_the_cpu():
    entries = torch.arange(5)
    want = noise.truncated_normals(entries, 1, (9, 64), seed=(3 << 32) + 1)
    got = noise.truncated_normals(entries.cuda(), 1, (9, 64), seed=(3 << 32) + 1).cpu()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)  # erfinv of two libraries


@pytest.mark.parametrize("rollouts", [1, 3])
def test_a_fixed_point_ends_rows_where_it_does_on_the_cpu(rollouts):
    net = recurx.shipped("sudoku-6x6").build()
    task = tasks.get("sudoku-6x6:clues=12")
    inputs = torch.from_numpy(tasks.Sampler(task, 0, "held-out").draw_distinct(64).inputs)
    arguments = dict(halt="fixed-point", rollouts=rollouts, init="random", select="vote")
    want = recurx.solve(net, {"inputs": inputs}, backend="eager", **arguments)
    got = recurx.solve(net.cuda(), {"inputs": inputs.cuda()}, backend="eager", **arguments)
    # fp32 with other orders of sums: a cell near a tie may take a step more or less.
    assert (got.rollout_steps.cpu() == want.rollout_steps).float().mean() > 0.95
    assert (got.predictions.cpu() == want.predictions).all(1).float().mean() > 0.95
