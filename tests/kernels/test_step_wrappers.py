"""The public optimisers, average, loss and step on their kernels, which the interpreter runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from recurx import small_ops
from recurx.backends.triton_window import TritonWindow
from recurx.models import PuzzleEmbedding, fused_stablemax_cross_entropy
from recurx.train import AdamATan2, Average, SparseSignSGD, Trainer
from tests.train import cases, guards
from tests.train.test_train import tiny

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")


@pytest.fixture
def kernels(triton_device, monkeypatch):
    """Every op takes its kernel, on whatever `triton_device` says."""
    monkeypatch.setattr(small_ops, "on_triton", lambda tensor: True)
    return triton_device


def versions(tensors) -> list[int]:
    return [t._version for t in tensors]


def test_adam_atan2_launches_once_a_pair_of_dtypes_and_counts_versions(kernels, monkeypatch):
    from recurx.kernels import adam_atan2 as module

    calls = []
    original = module.adam_atan2
    monkeypatch.setattr(
        module, "adam_atan2", lambda *a, **k: (calls.append(len(a[0])), original(*a, **k))
    )
    weights, grads = cases.weights_and_grads(3)
    params = [torch.nn.Parameter(w.clone().to(kernels)) for w in weights]
    params.append(torch.nn.Parameter(torch.ones(6, 5, device=kernels).T))  # not contiguous
    optimizer = AdamATan2(params, **cases.ADAM)
    for now in grads:
        for param, grad in zip(params, [*now, torch.ones(5, 6)], strict=True):
            param.grad = torch.empty_like(param).copy_(grad)
        before = versions(params)
        optimizer.step()
        assert all(now > then for now, then in zip(versions(params), before, strict=True))
    assert calls == [len(weights)] * 3
    got = [p.detach().cpu() for p in params]
    everything = [[*now, torch.ones(5, 6)] for now in grads]
    exact = cases.adam_atan2_fp64([*weights, torch.ones(5, 6)], everything)
    cases.assert_weights(got, exact, 3)
    assert "_recurx_tables" not in copy.deepcopy(optimizer.state_dict())


def test_average_and_sign_sgd_take_their_kernels(kernels):
    model = torch.nn.Linear(40, 30).to(kernels)
    average = Average(model, decay=0.5)
    start, before = average.weights["weight"].clone(), versions(average.weights.values())
    with torch.no_grad():
        model.weight.add_(1)
    average.update(model)
    torch.testing.assert_close(average.weights["weight"], start + 0.9)
    assert versions(average.weights.values()) > before and average.updates == 1

    embedding = PuzzleEmbedding(6, 4, 3, torch.float32, init_std=1.0).to(kernels)
    table = embedding.weights.clone()
    ids = torch.tensor([2, 2, 5], device=kernels)
    embedding(ids).mul(torch.tensor([[1.0], [-3.0], [2.0]], device=kernels)).sum().backward()
    grads, version = embedding.local_weights.grad.clone(), embedding.weights._version
    SparseSignSGD(embedding.buffers(), lr=0.125, weight_decay=0.5).step()
    want = cases.official_sign_sgd(table.cpu(), grads.cpu(), ids.cpu(), 0.125, 0.5)
    assert torch.equal(embedding.weights.cpu(), want) and embedding.weights._version > version


def test_the_loss_takes_its_kernels_under_autograd(kernels):
    logits, labels = cases.logits_and_labels("usual", torch.bfloat16)
    leaf = logits.to(kernels).requires_grad_()
    loss = fused_stablemax_cross_entropy(leaf, labels.to(kernels))
    loss.sum().backward()
    cases.assert_stablemax(loss.detach().cpu(), logits, labels)
    cases.assert_stablemax_grad(leaf.grad.cpu(), logits, labels, torch.ones(labels.shape))


def test_a_training_step_on_kernels_follows_the_plain_one(kernels, monkeypatch):
    """Loss, halting, queue, optimisers and average together, for as long as answers agree."""
    config = tiny(model={"puzzle_emb_ndim": 16}, loss="fused_stablemax_cross_entropy")
    ours = Trainer(config, device=kernels, captured=False)
    monkeypatch.setattr(small_ops, "on_triton", lambda tensor: False)
    plain = Trainer(config)
    for _ in range(4):
        monkeypatch.setattr(small_ops, "on_triton", lambda tensor: False)
        want = plain.train_step()
        monkeypatch.setattr(small_ops, "on_triton", lambda tensor: True)
        got = ours.train_step()
        assert got.sums == pytest.approx(want.sums, rel=1e-4)
        assert torch.equal(ours.carry.halted.cpu(), plain.carry.halted)
        for key, value in plain.carry.current_data.items():
            assert torch.equal(ours.carry.current_data[key].cpu(), value), key
    for name, weight in plain.model.named_parameters():
        other = ours.model.get_parameter(name).detach().cpu()
        torch.testing.assert_close(other, weight.detach(), rtol=1e-4, atol=1e-5, msg=name)
    for name, weight in plain.average.weights.items():
        torch.testing.assert_close(ours.average.weights[name].cpu(), weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_triton_engine_never_waits_inside_a_step(monkeypatch):
    """Forward, window and backward on backend triton, all kernels of the step: no host sync.

    The interpreter itself reads tensors, so the guard looks away while a kernel runs; and it looks
    into the custom ops, which hide what they do from a mode outside.
    """
    pytest.importorskip("triton")
    from simulate import triton_on_cpu
    from triton.runtime.jit import JITFunction

    entered = []

    def guarded(name, method):
        def run(*arguments, **keywords):
            entered.append(name)
            with guards.NoHostSync():
                return method(*arguments, **keywords)

        return run

    with triton_on_cpu("tiled") as engine:
        monkeypatch.setattr(small_ops, "on_triton", lambda tensor: True)
        window = TritonWindow(engine.packed_nets)
        monkeypatch.setattr(engine, "window", lambda problem: window)
        for owner, name in ((engine, "run"), (window, "forward"), (window, "backward")):
            monkeypatch.setattr(owner, name, guarded(name, getattr(owner, name)))
        config = tiny(
            batch_size=2, loss="fused_stablemax_cross_entropy",
            model={"hidden_size": 32, "H_cycles": 2, "L_cycles": 1, "puzzle_emb_ndim": 32},
        )  # fmt: skip
        run = Trainer(config, backend="triton")
        run.train_step()
        interpret = JITFunction.run

        def out_of_sight(kernel, *arguments, **keywords):
            with _disable_current_modes():
                return interpret(kernel, *arguments, **keywords)

        monkeypatch.setattr(JITFunction, "run", out_of_sight)
        entered.clear()
        with guards.NoHostSync():
            run.one_step._step()
        assert set(entered) == {"run", "forward", "backward"}
        with pytest.raises(guards.HostSync), guards.NoHostSync():  # the guard looks into ops
            monkeypatch.setattr(engine, "run", guarded("run", lambda *a: bool(a[1].x.sum() > 0)))
            run.one_step._step()
        monkeypatch.undo()
