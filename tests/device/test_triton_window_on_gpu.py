"""The Triton window on the hardware, at published size, judged as in tests/kernels."""

from __future__ import annotations

import pytest
import torch
from device_sizes import HEAD_DIM, PUBLISHED, SHAPE, waves

from recurx import Schedule, rope_tables
from recurx.nets import ATTENTION, KINDS, Net
from tests.factories import make_inputs, make_net, rounded
from tests.kernels.window_gradients import assert_close, gradients_of, on_triton

pytestmark = pytest.mark.gpu
SAVE = ("all", "block", "states")


def problem(kind, dtype, batch, schedule=None):
    schedule = Schedule.trm(2, 2) if schedule is None else schedule
    nets = {
        name: rounded(make_net(kind, seed=n, **PUBLISHED), dtype, torch.float32)
        for n, name in enumerate(schedule.nets)
    }
    nets = {name: Net(net.spec, [w.cuda() for w in net.weights]) for name, net in nets.items()}
    x, carry = make_inputs(schedule, batch=batch, dtype=dtype, **SHAPE)
    carry = {name: state.cuda() for name, state in carry.items()}
    cos_sin = rope_tables(SHAPE["tokens"], HEAD_DIM, device="cuda") if kind == ATTENTION else None
    return (schedule, nets, x.cuda(), carry), cos_sin


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_against_autograd(kind, dtype):
    given, cos_sin = problem(kind, dtype, batch=3)
    assert_close(gradients_of(on_triton(cos_sin), *given), *given, cos_sin)


@pytest.mark.parametrize("kind", KINDS)
def test_bit_equal_for_every_save_and_when_run_again(kind):
    """More rows than one wave of programs, and weight gradients in several ranges."""
    given, cos_sin = problem(kind, torch.bfloat16, batch=waves(1))
    first = gradients_of(on_triton(cos_sin), *given)
    for save in ("all", *SAVE):
        again = gradients_of(on_triton(cos_sin, save), *given)
        for name in first:
            assert torch.equal(first[name], again[name]), f"save={save!r}: gradient of {name}"


def peak_bytes(save, given, cos_sin):
    gradients_of(on_triton(cos_sin, save), *given)  # caches and compiled kernels are there now
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients_of(on_triton(cos_sin, save), *given)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("kind", KINDS)
def test_less_kept_is_less_memory(kind):
    given, cos_sin = problem(kind, torch.bfloat16, waves(0.5), Schedule.trm(1, 6))
    peaks = [peak_bytes(save, given, cos_sin) for save in ("states", "block", "all")]
    assert peaks == sorted(peaks) and peaks[0] < peaks[2] / 2, peaks


def test_forward_and_backward_in_one_graph():
    """No host sync and no allocation outside the graph's pool: new inputs give new gradients."""
    (schedule, nets, x, carry), cos_sin = problem(ATTENTION, torch.bfloat16, batch=5)

    def step():
        return gradients_of(on_triton(cos_sin), schedule, nets, x, carry)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    want = step()
    for name in want:
        assert torch.equal(captured[name], want[name]), name
