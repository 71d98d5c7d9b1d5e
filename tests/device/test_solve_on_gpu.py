"""recurx.solve(backend="cuda") on a real GPU, against the loop on the host."""

import pytest
import torch

import recurx
from recurx.models import TRM
from recurx.models.config import TRMConfig

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["attention", "tokens"])
def model(request):
    torch.manual_seed(0)
    make = TRMConfig.sudoku_att if request.param == "attention" else TRMConfig.sudoku_mlp
    made = TRM(make(puzzle_emb_ndim=512)).cuda().eval()
    with torch.no_grad():
        made.inner.q_head.weight.normal_(std=0.05)
        made.inner.q_head.bias.zero_()
    return made


def puzzles(count):
    inputs = torch.randint(1, 11, (count, 81), dtype=torch.int32, device="cuda")
    return {"inputs": inputs, "puzzle_identifiers": torch.zeros_like(inputs[:, 0])}


def test_a_queue_longer_than_the_owners_gives_the_answers_of_the_loop(model):
    batch = puzzles(3 * torch.cuda.get_device_properties(0).multi_processor_count + 5)
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
