"""What a window of the CPU engine keeps and uses again, and how much scratch it takes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import recurx
from recurx import Schedule
from recurx.backends import cpu, cpu_window
from recurx.nets import KINDS
from tests.cpu.windows import BF16, ONE, SAVE, case, on_engine, window_of
from tests.cpu.windows import small_work_is_split_too as small_work_is_split_too
from tests.kernels.window_gradients import kept_by_autograd, loss_of


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_keeps_what_its_knob_says(native, kind) -> None:
    """Bytes that autograd holds between forward and backward, beside x, carry and weights."""
    schedule, nets, x, carry, tables = case(Schedule.trm(2, 1), kind, BF16, blocks=1)
    x.requires_grad_()
    ours = x, *carry.values(), *tables, *(w for net in nets.values() for w in net.weights)
    held = {}
    for save in SAVE:
        with kept_by_autograd(*ours) as seen:
            out = recurx.recurse(
                schedule, nets, x, carry, backend="cpu", cos_sin=tables, save=save
            )  # fmt: skip
        held[save] = sum(seen.values())
        loss_of(out).backward()
    rows, entering = x.nbytes, 2 * x.nbytes
    assert held["states"] <= entering
    # Two calls of one block: h and out of each, both outs as states, and a few floats a row.
    assert held["block"] < entering + 6.5 * rows
    assert held["states"] < held["block"] < held["all"]


SCRATCH = """
import torch
from recurx import _C, Schedule, recurse
from tests.factories import make_inputs, make_net, rope
torch.set_num_threads(2)
sizes = dict(tokens=97, hidden=512)
net = make_net(**sizes, inner=1536, heads=8, requires_grad=True)
schedule = Schedule.trm(1, 6)
x, carry = make_inputs(schedule, batch=1, **sizes)
out = recurse(schedule, {"L": net}, x, carry, backend="cpu", cos_sin=rope(**sizes, heads=8))
out["z_H"].sum().backward()
print(_C.cpu_scratch_bytes() / sum(weight.nbytes for weight in net.weights))
"""


def test_scratch_of_one_sample_is_about_one_copy_of_the_weights(native) -> None:
    """In fp32, where PyTorch's own peak is near: another packed copy would go beyond it. A process
    of its own, since scratch is held for the largest call so far."""
    done = subprocess.run([sys.executable, "-c", SCRATCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.1


def test_what_was_kept_is_used_again(native, monkeypatch) -> None:
    """Once nothing holds it, and by windows of about that size; the gradients are the same."""
    for name, value in (("LEAST_SPARE", 1), ("_spare", []), ("_slow", [])):
        monkeypatch.setattr(cpu_window, name, value)
    monkeypatch.setattr(cpu_window, "SLOW_TOUCH", 1e9)
    given = case(Schedule.trm(1, 1))
    problem, operands, span, _ = window_of(*given)
    window = cpu.BACKEND.window(problem)

    def place(kept):
        return kept[0].data_ptr()

    _, first = window.forward(problem, operands, span, "all")
    _, second = window.forward(problem, operands, span, "all")
    places = {place(first), place(second)}
    part = first[0][1]
    del first
    _, third = window.forward(problem, operands, span, "all")
    assert place(third) not in places, "a view still holds the first"
    del part, second, third
    want = on_engine(cpu.BACKEND, case(Schedule.trm(1, 1), batch=1))  # too small for those
    _, again = window.forward(problem, operands, span, "all")
    assert place(again) in places
    again[0].fill_(float("nan"))
    most = again[0].nbytes
    del again
    got = on_engine(cpu.BACKEND, case(Schedule.trm(1, 1), batch=1))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    monkeypatch.setattr(cpu_window, "MOST_SPARE", most)
    window.forward(problem, operands, span, "all")
    assert sum(map(len, cpu_window._spare)) <= most


def test_gradients_stay_on_small_pages_where_large_ones_are_slow(native, monkeypatch) -> None:
    for name, value in (("LEAST_SPARE", 1), ("_spare", []), ("_slow", []), ("SLOW_TOUCH", -1.0)):
        monkeypatch.setattr(cpu_window, name, value)
    asked, real = [], cpu_window._on_huge_pages
    monkeypatch.setattr(cpu_window, "_on_huge_pages", lambda *of: asked.append(of) or real(*of))
    first = on_engine(cpu.BACKEND, case(Schedule.trm(1, 1)))
    assert cpu_window._slow and asked, "the first touch was slow"
    asked.clear()
    again = on_engine(cpu.BACKEND, case(Schedule.trm(1, 1)))
    assert asked == [] and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_only_what_is_asked_for_is_computed(native) -> None:
    problem, operands, span, d_outs = window_of(*case(Schedule.trm(1, 1)))
    window = cpu.BACKEND.window(problem)
    outs, kept = window.forward(problem, operands, span, "all")
    before = [t.clone() for t in (*outs, *kept)]
    given = problem, operands, span, "all", outs, kept, d_outs
    count = 1 + len(operands.states) + len(operands.weights)
    full = window.backward(*given, [True] * count)
    for alone in range(count):
        got = window.backward(*given, [i == alone for i in range(count)])
        assert [g is not None for g in got] == [i == alone for i in range(count)]
        assert torch.equal(got[alone], full[alone]), alone
    assert all(torch.equal(a, b) for a, b in zip(before, (*outs, *kept), strict=True))


def test_what_was_kept_of_another_size_is_refused(native) -> None:
    problem, operands, span, d_outs = window_of(*case(ONE))
    window = cpu.BACKEND.window(problem)
    outs, kept = window.forward(problem, operands, span, "all")
    short = [kept[0][:, :-1].contiguous(), kept[1]]
    with pytest.raises(ValueError, match="keeps has another size"):
        window.backward(problem, operands, span, "all", outs, short, d_outs, [True] * 10)
