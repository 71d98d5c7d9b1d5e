"""The kernels of the training step from the PTX that Triton emits, with the race checker on."""

from __future__ import annotations

import pytest
import torch

from tests.train import cases

from .. import build

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))


@pytest.fixture
def on_sm90():
    pytest.importorskip("triton")
    from .triton_launch import emulating

    with emulating("90"):
        yield


@pytest.mark.parametrize("name", ["usual", "extreme"])
def test_stablemax(on_sm90, name):
    from recurx.kernels import stablemax_cross_entropy as kernel

    logits, labels = cases.logits_and_labels(name, torch.bfloat16)
    outer = torch.linspace(-1, 2, labels.numel()).view(labels.shape)
    loss = kernel.stablemax_forward(logits, labels, -100)
    cases.assert_stablemax(loss, logits, labels)
    grad = kernel.stablemax_backward(outer, logits, labels, -100)
    cases.assert_stablemax_grad(grad, logits, labels, outer)


def test_adam_atan2(on_sm90):
    from recurx.kernels.adam_atan2 import adam_atan2
    from recurx.kernels.multi_tensor import Tables

    weights, grads = cases.weights_and_grads(1)
    exact = cases.adam_atan2_fp64(weights, grads)
    zeros = [[torch.zeros(w.shape) for w in weights] for _ in range(2)]
    steps = [torch.ones(()) for _ in weights]
    adam_atan2(weights, grads[0], *zeros, steps, **cases.ADAM, tables=Tables())
    cases.assert_weights(weights, exact, 1)


def test_sign_sgd(on_sm90):
    from recurx.kernels.sign_sgd import sign_sgd

    table, grads, ids = cases.table_and_batch()
    want = cases.official_sign_sgd(table, grads, ids, 0.125, 0.5)
    sign_sgd(table, grads, ids, lr=torch.tensor(0.125), weight_decay=0.5)
    assert torch.equal(table, want)


def test_average(on_sm90):
    from recurx.kernels.ema import ema
    from recurx.kernels.multi_tensor import Tables

    averages, values = cases.weights_and_grads(1)
    want = [torch.lerp(a, v, 0.25) for a, v in zip(averages, values[0], strict=True)]
    ema(averages, values[0], torch.tensor(0.25), tables=Tables())
    for got, exact in zip(averages, want, strict=True):
        torch.testing.assert_close(got, exact, rtol=2 * cases.U, atol=2 * cases.U)


def test_halting(on_sm90):
    from recurx.kernels.act_halt import act_halt

    exploration, *logits = cases.halting()
    exploration.state[1] = 2**40 + 5
    got = act_halt(*logits, exploration.state, 5, round(0.4 * 2**24))
    assert torch.equal(got, exploration.halt(*logits, 5, 0.4))


def test_queue(on_sm90):
    from recurx.kernels.queue_take import queue_take

    halted, cursor = torch.arange(300) % 3 == 0, torch.tensor(1000)
    index = queue_take(halted, cursor, 613)
    assert torch.equal(index[halted], (1000 + torch.arange(100)) % 613) and cursor == 1100
