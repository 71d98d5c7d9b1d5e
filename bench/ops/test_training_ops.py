"""What a training step does beside the recursion: loss, optimiser, weight average."""

from __future__ import annotations

import pytest
import torch

from bench.ops import DEVICE, draw
from recurx.models import TRM, TRMConfig
from recurx.models.losses import LOSSES
from recurx.train import AdamATan2, Average

BATCH = 64 if DEVICE == "cpu" else 768


@pytest.mark.parametrize("name", LOSSES)
def test_loss(timed, name):
    logits = draw(BATCH, 81, 11).requires_grad_()
    labels = torch.randint(0, 11, (BATCH, 81), device=DEVICE)

    def forward_and_backward():
        LOSSES[name](logits, labels).sum().backward()
        logits.grad = None

    per_token = LOSSES[name](logits, labels)
    assert per_token.shape == labels.shape and bool((per_token > 0).all())
    timed(forward_and_backward)


@pytest.fixture(scope="module")
def model():
    made = TRM(TRMConfig.sudoku_att(batch_size=BATCH)).to(DEVICE).train()
    for parameter in made.parameters():
        parameter.grad = torch.ones_like(parameter)
    return made


def test_adam_atan2(timed, model):
    optimizer = AdamATan2(model.parameters(), lr=1e-4, weight_decay=1.0)
    before = model.inner.lm_head.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.inner.lm_head.weight)
    timed(optimizer.step)


def test_average(timed, model):
    average = Average(model, 0.999)
    timed(average.update, model)


def test_puzzle_embedding(timed, model):
    table = model.puzzle_emb
    ids = torch.zeros(BATCH, dtype=torch.int32, device=DEVICE)
    table(ids)

    def step():
        table.local_weights.grad = torch.ones_like(table.local_weights)
        table.sign_sgd_(1e-4, 1.0)

    before = table.weights.clone()
    step()
    assert not torch.equal(before, table.weights)
    timed(step)
