"""The swapped, captured step on the official code itself (needs checkouts, tests/official.py)."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import recurx
from recurx.models import fused_stablemax_cross_entropy
from recurx.models.puzzle_embedding import sign_sgd_
from recurx.train import AdamATan2, CapturedStep, SampleQueue, SparseSignSGD, swap
from tests import official
from tests.train import cases
from tests.train.guards import HostSync, Tape, formula_alone, no_host_sync

SYSTEMS = ["trm", "hrm"]


def modules(system: str) -> dict[str, Any]:
    with official.importable(system):
        parts = official.import_parts(system)
        parts["losses"] = importlib.import_module("models.losses")
        parts["sparse"] = importlib.import_module("models.sparse_embedding")
        if system == "trm":
            parts["ema"] = importlib.import_module("models.ema")
    return parts


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_loss_is_the_official_one(system: str) -> None:
    published = modules(system)["losses"].stablemax_cross_entropy
    for name in ("usual", "zeros and ties", "wide"):
        logits, labels = cases.logits_and_labels(name, torch.float32)
        ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
        got, want = fused_stablemax_cross_entropy(ours, labels), published(theirs, labels)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)
        got.sum().backward()
        want.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_sparse_rule_is_the_official_one_to_the_bit(system: str) -> None:
    rule = modules(system)["sparse"]._sparse_emb_signsgd_dist
    for duplicates in (True, False):
        table, grads, ids = cases.table_and_batch(duplicates)
        theirs = table.clone()
        rule(grads, ids, theirs, lr=0.01, weight_decay=0.1, world_size=1)
        sign_sgd_(table, grads, ids, 0.01, 0.1)
        assert torch.equal(table, theirs)


def captured_loop(system: str, tape: Tape | None) -> CapturedStep:
    parts = modules(system)
    torch.manual_seed(0)
    model = parts["model"](official.config(system))
    head = parts["loss"](model, "stablemax_cross_entropy")
    sparse = parts["sparse"].CastedSparseEmbeddingSignSGD_Distributed(
        model.puzzle_emb.buffers(), world_size=1, lr=0.01, weight_decay=0.1
    )
    adam = AdamATan2(head.parameters(), lr=0.01)
    swap(head, sparse)
    drawn = iter(range(1000))
    queue = SampleQueue(lambda count: official.batch(count, seed=next(drawn)), slots=4)
    return CapturedStep(head, [sparse, adam], queue, capture=tape or False)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_official_step_is_captured_after_a_swap(system: str, monkeypatch) -> None:
    """Replays of the recorded operations give the bits of running the official code."""
    formula_alone(monkeypatch)
    traces: list[list[Tensor]] = []
    for tape in (None, Tape()):
        step = captured_loop(system, tape)
        torch.manual_seed(7)  # exploration draws from PyTorch's generator here
        trace = []
        for _ in range(8):
            step()
            trace += [t.clone() for t in step.static_tensors()[3:]]
        assert step.captured == (tape is not None)
        traces.append(trace)
    assert all(torch.equal(a, b) for a, b in zip(*traces, strict=True))


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_swapped_official_step_has_no_host_in_it(system: str) -> None:
    step = captured_loop(system, None)
    step()
    with no_host_sync():
        step._step()
    del step.optimizers[0].step  # the official rule again
    with pytest.raises(HostSync, match="unique"), no_host_sync():
        step._step()


def test_the_official_average_is_swapped() -> None:
    helper_class = modules("trm")["ema"].EMAHelper
    model = torch.nn.Linear(3, 2)
    theirs, ours = helper_class(0.9), helper_class(0.9)
    for helper in (theirs, ours):
        helper.register(model)
    swap(ours)
    for _ in range(4):
        with torch.no_grad():
            model.weight.add_(0.5)
        theirs.update(model)
        ours.update(model)
    for name, want in theirs.shadow.items():
        torch.testing.assert_close(ours.shadow[name], want)
    assert not torch.equal(ours.shadow["weight"], model.weight)


def test_official_buffers_fit_our_optimizer() -> None:
    model = modules("trm")["model"](official.config("trm"))
    assert SparseSignSGD(model.puzzle_emb.buffers(), lr=0).param_groups


@pytest.mark.parametrize("system", SYSTEMS)
def test_training_on_the_engines_window_follows_the_official_one(native: None, system: str) -> None:
    """24 steps in fp32, forward and backward in the CPU engine: losses to 1e-6."""
    parts, traces = modules(system), []
    for backend in (None, "cpu"):
        torch.manual_seed(0)
        model = parts["model"](official.config(system, halt_exploration_prob=0.0))
        head = parts["loss"](model, "stablemax_cross_entropy")
        if backend is not None:
            recurx.patch(head, backend=backend)
        sparse = parts["sparse"].CastedSparseEmbeddingSignSGD_Distributed(
            model.puzzle_emb.buffers(), world_size=1, lr=1e-4, weight_decay=0.1
        )
        optimizers = [sparse, AdamATan2(head.parameters(), lr=1e-4)]
        carry, trace = head.initial_carry(official.batch(4, seed=0)), []
        for step in range(24):
            batch = official.batch(4, seed=step)
            carry, loss, *_ = head(carry=carry, batch=batch, return_keys=[])
            (loss / 4).backward()
            trace.append(loss.item())
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        traces.append(torch.tensor(trace, dtype=torch.float64))
    torch.testing.assert_close(traces[1], traces[0], rtol=1e-6, atol=0)
