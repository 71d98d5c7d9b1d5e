"""The Triton window on the hardware, at published size, judged as in tests/kernels."""

from __future__ import annotations

import pytest
import torch
from device_sizes import HEAD_DIM, PUBLISHED, SHAPE, waves

from recurx import Schedule, rope_tables
from recurx.nets import ATTENTION, KINDS, BlockSpec, Net
from tests.factories import make_inputs, make_net, rounded
from tests.kernels.window_gradients import assert_close, gradients_of, on_triton
from tests.variants import net_of

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_with_products_of_the_library(kind, dtype):
    """Against autograd, and the same bits for every save."""
    given, cos_sin = problem(kind, dtype, batch=3)
    first = gradients_of(on_triton(cos_sin, way="triton/library"), *given)
    assert_close(first, *given, cos_sin)
    for save in SAVE:
        again = gradients_of(on_triton(cos_sin, save, "triton/library"), *given)
        for name in first:
            assert torch.equal(first[name], again[name]), f"save={save!r}: gradient of {name}"


HEADS = PUBLISHED["heads"]
FIELDS = {
    "URM": dict(conv=2),
    "Sotaku": dict(
        norm="layer", norm_weight=True, norm_bias=True, placement="pre", activation="relu",
        gated=False, biases=("qkv", "o", "gate_up", "down"),
    ),
    "SIC": dict(attn_norm="rms", inner_norm="rms", inner_norm_of="product"),
    "HRM-Text": dict(
        attn_gate=True, mask="prefix", prefix=16, placement="pre", kv_heads=HEADS // 2
    ),
    "FPRM": dict(placement="sandwich", learned_skip="channel", learned_scale="channel",
                 qk_norm="rms", qk_norm_weight=True, norm_weight=True),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("system", FIELDS)
def test_gradients_of_other_blocks(system, dtype):
    """Against autograd, and the same bits for every save."""
    spec = BlockSpec(ATTENTION, *(PUBLISHED[n] for n in ("hidden", "inner", "heads")),
                     **FIELDS[system])  # fmt: skip
    (schedule, _, x, carry), cos_sin = problem(ATTENTION, dtype, batch=3)
    net = rounded(net_of(spec, spec), dtype, torch.float32)
    given = schedule, {"L": Net(net.spec, [w.cuda() for w in net.weights])}, x, carry
    first = gradients_of(on_triton(cos_sin, way="triton/library"), *given)
    assert_close(first, *given, cos_sin)
    for save in SAVE:
        again = gradients_of(on_triton(cos_sin, save, "triton/library"), *given)
        for name in first:
            assert torch.equal(first[name], again[name]), f"save={save!r}: gradient of {name}"
