"""`recurx.train.swap` on an official-style training loop: same numbers, no host, refusals."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recurx.errors import UnsupportedModel
from recurx.models import TRM, fused_stablemax_cross_entropy
from recurx.train import AdamATan2, SparseSignSGD, provide_adam_atan2, swap
from tests.train import official_like
from tests.train.guards import HostSync, no_host_sync


def batch(index: int) -> dict[str, Tensor]:
    """Four samples of three puzzles; some labels do not count."""
    generator = torch.Generator().manual_seed(index)
    labels = torch.randint(0, 6, (4, 5), generator=generator)
    labels[0, :2] = -100
    inputs = torch.randint(0, 6, (4, 5), generator=generator)
    return {"inputs": inputs, "labels": labels, "puzzle_identifiers": torch.tensor([1, 0, 1, 2])}


class Loop:
    """A loop in the official style: one supervision step, its optimisers and its average."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = TRM(
            hidden_size=16, num_heads=2, expansion=2.0, inner_multiple=16, L_layers=1, H_cycles=2,
            L_cycles=1, seq_len=5, vocab_size=6, batch_size=4, puzzle_emb_ndim=16,
            num_puzzle_identifiers=3, forward_dtype="float32", halt_max_steps=3, puzzle_emb_len=1,
        )  # fmt: skip
        self.head = official_like.LossHead(model)
        self.optimizers = [
            official_like.SignSGD(model.puzzle_emb.buffers(), world_size=1, lr=0),
            official_like.Atan2(self.head.parameters(), lr=0, betas=(0.9, 0.95), weight_decay=0.1),
        ]
        self.ema = official_like.Ema(0.9)
        self.ema.register(self.head)
        self.carry: Any = None

    def step(self, index: int) -> Tensor:
        data = batch(index)
        self.carry = self.head.initial_carry(data) if self.carry is None else self.carry
        self.carry, loss, *_ = self.head(return_keys=[], carry=self.carry, batch=data)
        (loss / 4).backward()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.01
            optimizer.step()
            optimizer.zero_grad()
        self.ema.update(self.head)
        return loss.detach()

    def state(self) -> list[Tensor]:
        state = self.head.state_dict()
        return [*state.values(), *(self.ema.shadow[k] for k in sorted(self.ema.shadow))]


def run(loop: Loop, steps: int = 6) -> list[Tensor]:
    torch.manual_seed(1)  # exploration
    return [loop.step(n) for n in range(steps)] + loop.state()


def test_a_swapped_loop_gives_the_numbers_of_the_original() -> None:
    original, swapped = Loop(), Loop()
    handle = swap(swapped.head, *swapped.optimizers, swapped.ema)
    assert len(handle.report.patched) == 4 and not handle.report.refused
    assert "no fp64" in str(handle.report)
    for got, want in zip(run(swapped), run(original), strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=2e-5, atol=2e-6)


def test_the_comparison_notices_what_is_left_out() -> None:
    """Planted bugs: a decay forgotten, a loss that is another one."""
    want = run(Loop())
    for change in (
        lambda loop: loop.optimizers[1].param_groups[0].update(weight_decay=0.0),
        lambda loop: setattr(loop.head, "loss_fn", official_like.softmax),
        lambda loop: setattr(loop.ema, "mu", 0.95),
        lambda loop: loop.optimizers[0].param_groups[0].update(weight_decay=0.9),
    ):
        wrong = Loop()
        change(wrong)
        close = [
            torch.allclose(a.double(), b.double(), rtol=2e-5, atol=2e-6)
            for a, b in zip(run(wrong), want, strict=True)
        ]
        assert not all(close)


def test_swapping_in_the_middle_goes_on_with_the_state_and_back() -> None:
    original, swapped = Loop(), Loop()
    want, got = [], []
    for loop, out in ((original, want), (swapped, got)):
        torch.manual_seed(1)
        out += [loop.step(0), loop.step(1)]
        if loop is swapped:
            handle = swap(*loop.optimizers, loop.ema, loop.head)
        out += [loop.step(2), loop.step(3)]
        if loop is swapped:
            handle.remove()
            assert loop.head.loss_fn is official_like.stablemax
            assert "step" not in vars(loop.optimizers[1]) and "update" not in vars(loop.ema)
        out += [loop.step(4), *loop.state()]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=2e-6)


def test_the_swapped_parts_never_wait() -> None:
    loop = Loop()
    loop.step(0)
    with pytest.raises(HostSync), no_host_sync():
        loop.step(1)
    loop = Loop()
    with swap(loop.head, *loop.optimizers, loop.ema):
        loop.step(0)
        with no_host_sync():
            loop.step(1)
    assert "step" not in vars(loop.optimizers[0])


def test_what_is_not_known_is_refused_and_nothing_changes() -> None:
    loop = Loop()
    softmax = official_like.LossHead(loop.head.model, official_like.softmax)
    quotient = official_like.Quotient(loop.head.parameters())
    adamw = torch.optim.AdamW(loop.head.parameters())
    for thing, says in (
        (softmax, "not stablemax"),
        (quotient, "not AdamATan2"),
        (adamw, "settings"),
        (torch.nn.Linear(2, 2), "Linear"),
        (object(), "shadow"),
        (AdamATan2(loop.head.parameters()), "already"),
        (SparseSignSGD(loop.head.model.puzzle_emb.buffers()), "already"),
    ):
        with pytest.raises(UnsupportedModel, match=says):
            swap(loop.ema, thing)
        assert "update" not in vars(loop.ema)
    with swap(loop.head), pytest.raises(UnsupportedModel, match="already"):
        swap(loop.head)


def test_a_compiled_head_is_swapped_inside() -> None:
    loop = Loop()
    compiled = torch.compile(loop.head, backend="eager")
    with swap(compiled):
        assert loop.head.loss_fn is fused_stablemax_cross_entropy
    assert loop.head.loss_fn is official_like.stablemax


def test_adam_atan2_can_be_imported_without_its_package(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "adam_atan2", raising=False)
    provide_adam_atan2()
    from adam_atan2 import AdamATan2 as imported

    assert imported is AdamATan2
    other = sys.modules["adam_atan2"]
    provide_adam_atan2()
    assert sys.modules["adam_atan2"] is other
    monkeypatch.delitem(sys.modules, "adam_atan2")


def clipped(logits, labels, ignore_index=-100):
    """The right values, gradients of its own."""
    free = fused_stablemax_cross_entropy(logits, labels, ignore_index=ignore_index)
    return free.detach() + 0.5 * (free - free.detach())


def noisy(logits, labels, ignore_index=-100):
    torch.rand(1)
    return fused_stablemax_cross_entropy(logits, labels, ignore_index=ignore_index)


@pytest.mark.parametrize("loss,why", [(clipped, "differs by"), (noisy, "random numbers")])
def test_a_loss_is_proved_with_its_gradients(loss, why) -> None:
    head = nn.Module()
    head.loss_fn = loss
    with pytest.raises(UnsupportedModel, match=why):
        swap(head)


class Warmed:
    """An average that follows faster at first."""

    def __init__(self, fast: float) -> None:
        self.mu, self.shadow, self.fast = 0.99, {"weight": torch.ones(2)}, fast

    def update(self, module: nn.Module) -> None:
        mu = self.fast or self.mu
        for name, p in module.named_parameters():
            self.shadow[name].mul_(mu).add_(p.detach(), alpha=1 - mu)


def test_an_average_is_proved_on_a_small_module() -> None:
    state = torch.get_rng_state()
    with pytest.raises(UnsupportedModel, match="is not mu"):
        swap(Warmed(fast=0.5))
    helper = Warmed(fast=0.0)
    assert "one launch" in str(swap(helper).report)
    assert torch.equal(helper.shadow["weight"], torch.ones(2))
    assert torch.equal(state, torch.get_rng_state())
