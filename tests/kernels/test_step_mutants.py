"""Bugs planted in the source of the step's kernels: the same comparisons must reject each."""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")
from mutants import planted
from recurx.kernels.multi_tensor import Tables

from tests.train import cases

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:divide by zero")


def stablemax(module, device):
    for name in ("usual", "leaning to the label", "extreme"):
        logits, labels = cases.logits_and_labels(name)
        outer = torch.linspace(-1, 2, labels.numel()).view(labels.shape)
        there = [t.to(device) for t in (logits, labels, outer)]
        loss = module.stablemax_forward(*there[:2], -100).cpu()
        cases.assert_stablemax(loss, logits, labels)
        grad = module.stablemax_backward(there[2], *there[:2], -100).cpu()
        cases.assert_stablemax_grad(grad, logits, labels, outer)


def adam_atan2(module, device):
    weights, grads = cases.weights_and_grads(2)
    exact = cases.adam_atan2_fp64(weights, grads)
    there = [w.clone().to(device) for w in weights]
    moments = [[torch.zeros(w.shape, device=device) for w in weights] for _ in range(2)]
    for step, now in enumerate(grads, start=1):
        steps = [torch.full((), float(step), device=device) for _ in weights]
        on_device = [g.to(device) for g in now]
        module.adam_atan2(there, on_device, *moments, steps, **cases.ADAM, tables=Tables())
    cases.assert_weights([w.cpu() for w in there], exact, 2)


def ema(module, device):
    averages, (values,) = cases.weights_and_grads(1)
    for share in (0.25, 0.75):
        there = [a.clone().to(device) for a in averages]
        weight = torch.tensor(share, device=device)
        module.ema(there, [v.to(device) for v in values], weight, tables=Tables())
        for got, average, value in zip(there, averages, values, strict=True):
            want = torch.lerp(average, value, share)
            torch.testing.assert_close(got.cpu(), want, rtol=4 * cases.U, atol=4 * cases.U)


def sign_sgd(module, device):
    table, grads, ids = cases.table_and_batch()
    want = cases.official_sign_sgd(table, grads, ids, 0.125, 0.5)
    there = [t.clone().to(device) for t in (table, grads, ids)]
    module.sign_sgd(*there, lr=torch.tensor(0.125, device=device), weight_decay=0.5)
    assert torch.equal(there[0].cpu(), want), "rows differ"


def act_halt(module, device):
    exploration, *inputs = cases.halting()
    exploration.state[1], exploration.first_slot = 2**33 + 5, 300
    state = exploration.state.to(device, copy=True)
    got = module.act_halt(*(t.to(device) for t in inputs), state, 5, round(0.4 * 2**24), 300)
    want = exploration.halt(*inputs, 5, 0.4)
    assert torch.equal(got.cpu(), want), "halting differs"


def queue_take(module, device):
    halted, cursor = torch.arange(300) % 3 == 0, torch.tensor(1000, device=device)
    for _ in range(2):
        index = module.queue_take(halted.to(device), cursor, 613).cpu()
    assert torch.equal(index[halted], (1100 + torch.arange(100)) % 613), "rows differ"


CHECKS = {f.__name__: f for f in (stablemax, adam_atan2, ema, sign_sgd, act_halt, queue_take)}
MODULES = {name: name for name in CHECKS} | {"stablemax": "stablemax_cross_entropy"}
# what is planted: (kernel, text, its replacement)
BUGS = {
    "not divided by the largest": ("stablemax", "(1.0 + tl.abs(most))", "(1.0 + 0 * most)"),
    "label among the others": ("stablemax", "tl.where(is_label, 0.0, ratio)", "ratio"),
    "far label by the near formula": ("stablemax", "own < TINY, far", "own < 0.0, far"),
    "slope of s forgotten": ("stablemax", " * (1.0 + tl.abs(x)))", " * (1.0 + 0 * x))"),
    "a coefficient of log1p": ("stablemax", "p * t + 1.0 / 5.0", "p * t + 1.0 / 6.0"),
    "ignored tokens count": ("stablemax", "live & (label != ignore)", "live"),
    "no weight decay": ("adam_atan2", "w * (1.0 - rate * decay)", "w"),
    "atan beyond 45 degrees": ("adam_atan2", "HALF_PI - angle, angle", "angle, angle"),
    "sign of the angle": ("adam_atan2", "tl.where(y < 0, -angle, angle)", "angle"),
    "correction of the other moment": ("adam_atan2", "power(rate2, steps)", "power(rate1, steps)"),
    "a coefficient of atan": ("adam_atan2", "p = p * t + A3", "p = p * t + A2"),
    "tail of a chunk": ("adam_atan2", "row + 5, offsets,", "row + 5, offsets + 1,"),
    "share of the other side": ("ema", "(1.0 - share) * change", "share * change"),
    "every second chunk": ("ema", "tl.program_id(0) * 3", "(tl.program_id(0) & -2) * 3"),
    "the largest of equal ids": ("sign_sgd", "tl.sum(found, 0)", "tl.max(found, 0)"),
    "every equal id steps": ("sign_sgd", "earlier == 0", "earlier >= 0"),
    "no decay of rows": ("sign_sgd", "1.0 - rate * decay", "1.0 + 0 * rate * decay"),
    "one step late": ("act_halt", "taken >= MOST", "taken > MOST"),
    "count of 31 bits": ("act_halt", "count >> 31", "count >> 63"),
    "slots of another rank": ("act_halt", "first + slot, low", "slot, low"),
    "the draw that chose to explore": ("act_halt", "(r1 >> 8)", "(r0 >> 8)"),
    "most steps never drawn": ("act_halt", "% (MOST - 1)", "% (MOST - 2)"),
    "rank counts the slot itself": ("queue_take", "- ends\n", "\n"),
    "cursor not moved": ("queue_take", "tl.store(cursor, at)", "tl.store(cursor, at * 0 + 1000)"),
    "blocks forget those before": ("queue_take", "tl.sum(ends, 0)", "tl.max(ends, 0)"),
}


@pytest.mark.parametrize("name", CHECKS)
def test_the_kernels_pass(triton_device, name):
    CHECKS[name](importlib.import_module(f"recurx.kernels.{MODULES[name]}"), triton_device)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_rejected(triton_device, bug, tmp_path):
    name, old, new = BUGS[bug]
    with pytest.raises(AssertionError):
        CHECKS[name](planted(MODULES[name], old, new, tmp_path), triton_device)
