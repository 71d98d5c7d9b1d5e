"""Several threads ask one model: each gets its own answers, and nobody sees the model change."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recurx import solve
from recurx.backends import cpu
from recurx.models import HRM, TRM
from recurx.solving import asking
from tests import forked, official

BACKENDS = ("eager", "cpu") if cpu.BACKEND.why_unavailable() is None else ("eager",)


def own(kind: type, training: bool) -> nn.Module:
    torch.manual_seed(0)
    small: dict[str, Any] = dict(hidden_size=32, num_heads=2, H_cycles=1, L_cycles=1, L_layers=1)
    small["forward_dtype"] = "float32"
    if kind is HRM:
        small["H_layers"] = 1
    model = kind(
        **small, seq_len=6, vocab_size=7, batch_size=2, num_puzzle_identifiers=5,
        puzzle_emb_ndim=32, puzzle_emb_len=1,
    )  # fmt: skip
    model.inner.puzzle_emb.weights.normal_()
    return model.train(training)


def question(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "inputs": torch.randint(7, (5, 6), generator=draw),
        "puzzle_identifiers": torch.randint(5, (5,), generator=draw),
    }


class Watch:
    """Looks at the attributes that a careless solve would flip, again and again."""

    def __init__(self, model: Any) -> None:
        self.model, self.stop, self.looks = model, threading.Event(), 0
        self.expected = self.look()
        self.seen: list[Any] = []

    def look(self) -> Any:
        inner = self.model.inner
        return (inner.backend, "forward" in vars(inner), [m.training for m in self.model.modules()])

    def run(self) -> None:
        while not self.stop.is_set():
            now = self.look()
            self.looks += 1
            if now != self.expected:
                self.seen.append(now)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("kind", [TRM, HRM])
def test_own_models_are_never_changed(kind: type, training: bool) -> None:
    """In training mode a batch over batch_size would be refused, and rows copied for gradients."""
    model = own(kind, training)
    expected = {
        (backend, seed): solve(
            own(kind, False), question(seed), 3, None, backend=backend, logits=True
        )
        for backend in BACKENDS
        for seed in range(3)
    }
    local = model.inner.puzzle_emb.local_weights.clone()
    watch, wrong = Watch(model), list[Any]()

    def work(number: int) -> None:
        for turn in range(6):
            backend, seed = BACKENDS[(number + turn) % len(BACKENDS)], (number + turn) % 3
            got = solve(model, question(seed), 3, None, backend=backend, logits=True)
            if not torch.equal(got.logits, expected[backend, seed].logits):
                wrong.append((backend, seed))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    watcher = threading.Thread(target=watch.run)
    for thread in (watcher, *workers):
        thread.start()
    for worker in workers:
        worker.join()
    watch.stop.set()
    watcher.join()
    assert not wrong and not watch.seen and watch.looks > 100
    assert torch.equal(model.inner.puzzle_emb.local_weights, local)


def test_the_backend_is_the_one_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = own(TRM, True), list[str]()
    from recurx.models import inner as module

    real = module.recurse

    def recurse(*arguments: Any, backend: str, **rest: Any) -> Any:
        asked.append(backend)
        return real(*arguments, backend=backend, **rest)

    monkeypatch.setattr(module, "recurse", recurse)
    model.inner.backend = "eager"
    solve(model, question(0), 1)
    solve(model, question(0), 1, backend="auto")
    assert asked == ["eager", "auto"]


# ---- models of other code ------------------------------------------------------------------------


class Noisy(nn.Module):
    """A head that answers otherwise in training mode."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.modes = head, []

    @property
    def weight(self) -> Tensor:
        return self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.head(x) + (100 * torch.rand(()) if self.training else 0)


@pytest.fixture
def foreign() -> Iterator[Any]:
    model = own(TRM, True)
    model.inner.lm_head = Noisy(model.inner.lm_head)
    yield model
    assert not asking._changed


def test_other_modules_are_in_evaluation_mode_by_turns(foreign: Any) -> None:
    expected = solve(own(TRM, False), question(0), 2, None, logits=True)
    results: list[Tensor] = []

    def work() -> None:
        for backend in (None, "eager", *BACKENDS):
            results.append(
                solve(foreign, question(0), 2, None, backend=backend, logits=True).logits
            )

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4 * (2 + len(BACKENDS)) and not any(foreign.inner.lm_head.modes)
    assert all(torch.allclose(got, expected.logits, atol=1e-4) for got in results)
    assert all(module.training for module in foreign.modules()) and foreign.backend == "auto"


def test_the_mode_returns_after_an_error_and_nested_calls(foreign: Any) -> None:
    inner_answers: list[Tensor] = []

    def accepts(inputs: Tensor, answers: Tensor) -> Tensor:
        inner_answers.append(solve(foreign, question(1), 1).predictions)
        assert not foreign.training  # still the outer call's
        return torch.ones(len(inputs), dtype=torch.bool)

    solve(foreign, question(0), 1, select=accepts)
    assert inner_answers and all(module.training for module in foreign.modules())

    def fails(*_: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        solve(foreign, question(0), 1, select=fails)
    assert all(module.training for module in foreign.modules())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_gets_the_mode_back(foreign: Any) -> None:
    begun, end = threading.Event(), threading.Event()

    def accepts(inputs: Tensor, answers: Tensor) -> Tensor:
        begun.set()
        end.wait()
        return torch.ones(len(inputs), dtype=torch.bool)

    worker = threading.Thread(target=lambda: solve(foreign, question(0), 1, select=accepts))
    worker.start()
    begun.wait()
    assert not foreign.training

    def restored() -> bool:
        with asking._changing:
            return all(module.training for module in foreign.modules())

    pid = forked.begun(restored)
    end.set()
    worker.join()
    assert os.waitpid(pid, 0)[1] == 0 and foreign.training


def test_official_models_on_several_backends() -> None:
    """Each call patches and restores them; none sees the patch of another."""
    loaded = official.load("trm")
    torch.manual_seed(3)
    model = loaded["model"](official.config("trm", halt_max_steps=16)).train()
    with torch.no_grad():  # its answers shall differ, and its puzzle rows too
        model.inner.puzzle_emb.weights.normal_()
    batch = official.batch()
    expected = solve(model, batch, 2, None, logits=True).logits.float()
    results: list[Tensor] = []

    def work(number: int) -> None:
        for turn in range(2):
            backend = (None, "eager", "auto")[(number + turn) % 3]
            found = solve(model, batch, 2, None, backend=backend, logits=True)
            results.append(found.logits.float())

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 8 and "forward" not in vars(model.inner)
    assert all(module.training for module in model.modules())
    for got in results:
        assert (got - expected).norm() < 0.05 * expected.norm()
