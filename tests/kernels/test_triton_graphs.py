"""Slices, captured graphs and kept weights of backend="triton", with a stand-in for CUDA graphs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")
from simulate import FakeGraphs, triton_on_cpu

import recurx
from recurx import Schedule
from recurx.backends import graphs as graphs_module
from recurx.backends import triton as backend_module
from recurx.backends.weight_cache import frozen_weights
from recurx.nets import ATTENTION, TOKEN_MLP, Net
from tests.factories import make_inputs, make_net, rope

SHAPE = dict(tokens=5, hidden=32)
SCHEDULE = Schedule.trm(1, 1)
HOISTED = Schedule.trm(1, 2)  # z_H + x is formed once, for two calls


def net_of(kind=ATTENTION, seed=0):
    return make_net(kind, blocks=1, inner=16, token_inner=16, heads=1, seed=seed, **SHAPE)


def run(net, x, carry, schedule=SCHEDULE, cos_sin=None, **keywords):
    tables = rope(**SHAPE, heads=1) if cos_sin is None else cos_sin
    return recurx.recurse(
        schedule, {"L": net}, x, carry, backend="triton", cos_sin=tables, **keywords
    )


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def inputs(batch, seed=1):
    return make_inputs(SCHEDULE, batch=batch, dtype=torch.bfloat16, seed=seed, **SHAPE)


@pytest.mark.parametrize("way", ["tiled", "library"])
@pytest.mark.parametrize("kind", [ATTENTION, TOKEN_MLP])
def test_replays_have_the_bits_of_plain_launches(kind, way):
    """The first slice launches, the second captures, the rest replays; then all replays."""
    net, (x, carry) = net_of(kind), inputs(3)
    with triton_on_cpu(way, slice=1):
        want = run(net, x, carry, HOISTED)
    graphs = FakeGraphs(allocates=way == "library")
    with triton_on_cpu(way, slice=1, capture=graphs) as backend:
        assert same(run(net, x, carry, HOISTED), want)
        assert (graphs.captures, graphs.replays) == (1, 2)
        assert same(run(net, x, carry, HOISTED), want)
        assert (graphs.captures, graphs.replays, len(backend.recordings)) == (1, 5, 1)
    # z_H + x once, a sum and the kernels of one block for each of three calls, the last norm.
    block, last = (8, 0) if way == "library" else (5 if kind == ATTENTION else 4, 1)
    assert graphs.launches == 1 + 3 * (1 + block) + last


def test_a_call_is_at_most_five_launches_a_block_and_one():
    """No norm has a launch of its own, but where a token-MLP reads what a block has left raw."""
    for kind, launches in ((ATTENTION, 5 + 5), (TOKEN_MLP, 4 + 5)):
        net = make_net(kind, blocks=2, inner=16, token_inner=16, heads=1, **SHAPE)
        graphs, calls = FakeGraphs(), len(SCHEDULE)
        with triton_on_cpu("tiled", slice=1, capture=graphs):
            run(net, *inputs(2))
        assert graphs.launches == calls * (launches + 1) + 1, kind


def test_a_short_last_slice():
    net, (x, carry) = net_of(TOKEN_MLP), inputs(3)
    with triton_on_cpu("tiled"):
        want = run(net, x, carry)
    with triton_on_cpu("tiled", slice=2, capture=FakeGraphs()) as backend:
        assert same(run(net, x, carry), want)
        (recording,) = backend.recordings._entries.values()
        assert recording.buffers._arena.shape[1] == 2, "the batch was meant to be sliced"
        assert same(run(net, x, carry), want)


def test_replays_follow_the_inputs_and_the_rotary_tables():
    """Nothing of the call that was captured may stick: x, states, cos and sin."""
    net, graphs = net_of(), FakeGraphs()
    turned = recurx.rope_tables(5, 32, base=100.0)
    with triton_on_cpu("tiled", slice=1, capture=graphs):
        run(net, *inputs(2))
        other = run(net, *inputs(2, seed=5), cos_sin=turned)
    assert graphs.captures == 1
    with triton_on_cpu("tiled"):
        assert same(other, run(net, *inputs(2, seed=5), cos_sin=turned))
        assert not same(other, run(net, *inputs(2, seed=5)))


def test_a_replay_sees_new_weights():
    """An optimiser step changes the masters; their rounded copies keep their addresses."""
    net, (x, carry), graphs = net_of(TOKEN_MLP), inputs(2), FakeGraphs()
    with triton_on_cpu("tiled", slice=1, capture=graphs) as backend:
        before = run(net, x, carry)
        with torch.no_grad():
            for weight in net.weights:
                weight.mul_(1.5)
        after = run(net, x, carry)
        assert graphs.captures == 1 and len(backend.tapes) == 1
        moved = Net(net.spec, [weight.clone() for weight in net.weights])
        assert same(run(moved, x, carry), after)
        assert graphs.captures == 2, "other tensors are another tape, and another graph"
    with triton_on_cpu("tiled"):
        assert same(after, run(net, x, carry)) and not same(after, before)


def test_weights_are_rounded_at_every_call_that_has_not_frozen_them(monkeypatch):
    """Before the replay of a captured graph too, which reads what was rounded for this call."""
    net, (x, carry), graphs = net_of(TOKEN_MLP), inputs(1), FakeGraphs()
    fills = []
    fill = backend_module.PackedNets.fill
    monkeypatch.setattr(
        backend_module.PackedNets,
        "fill",
        lambda tape, weights: fills.append(1) or fill(tape, weights),
    )
    with triton_on_cpu("tiled", slice=1, capture=graphs):
        first = run(net, x, carry)
        assert same(run(net, x, carry), first) and len(fills) == 2 and graphs.captures == 1
        net.weights[0].data.mul_(2)  # no version counter shows this
        changed = run(net, x, carry)
        assert not same(changed, first) and len(fills) == 3
        with frozen_weights():
            for _ in range(3):
                assert same(run(net, x, carry), changed)
            assert len(fills) == 4
            with frozen_weights():  # of the one around it
                run(net, x, carry)
            assert len(fills) == 4
        with frozen_weights():
            run(net, x, carry)
        run(net, x, carry)
        assert len(fills) == 6 and graphs.captures == 1


def test_an_outer_capture_is_not_captured_again(monkeypatch):
    """Inside somebody's own graph: plain launches, and the rounding of weights is part of it."""
    net, (x, carry), graphs = net_of(TOKEN_MLP), inputs(2), FakeGraphs()
    with triton_on_cpu("tiled", slice=1, capture=graphs) as backend:
        want = run(net, x, carry)
        captured = graphs.captures, graphs.replays
        monkeypatch.setattr(backend_module, "captured_outside", lambda device: True)
        monkeypatch.setattr(backend, "_capture", lambda device: None)
        net.weights[0].data.mul_(2)  # as a replayed optimiser step would: no version changes
        inside = run(net, x, carry)  # in buffers of its own
        assert (len(backend.recordings), len(backend.tapes)) == (1, 1)
    assert (graphs.captures, graphs.replays) == captured
    with triton_on_cpu("tiled"):
        assert same(inside, run(net, x, carry)) and not same(inside, want)


def test_recordings_are_bounded():
    cache = graphs_module.RecordingCache(limit=2)
    made = []

    def make(key):
        return lambda: made.append(key) or graphs_module.Recording(key, lambda: None)

    for key in "abab":
        cache.get(key, make(key))
    assert made == ["a", "b"]
    cache.get("c", make("c"))  # a was used longest ago
    assert "a" not in cache and "b" in cache and len(cache) == 2
    cache.get("a", make("a"))
    assert made == ["a", "b", "c", "a"]


def test_other_shapes_and_ranges_are_other_recordings():
    net, graphs = net_of(TOKEN_MLP), FakeGraphs()
    x, carry = inputs(2)
    with triton_on_cpu("tiled", slice=1, capture=graphs) as backend:
        run(net, x, carry)
        run(net, x, carry, stop_after=1)
        run(net, x.float(), {name: state.float() for name, state in carry.items()})
        assert len(backend.recordings) == 3
        run(net, *inputs(3))  # another batch of the same slices
        assert len(backend.recordings) == 3


def test_a_graph_that_keeps_an_input_is_rejected(monkeypatch):
    """Planted: the slice does not take x in again. The test of the inputs must see it."""
    from recurx.kernels import tiled

    enter = tiled.TiledSlice.enter
    seen = []

    def stale(self, operands, live):
        seen.append(1)
        if len(seen) == 1:
            enter(self, operands, live)

    monkeypatch.setattr(tiled.TiledSlice, "enter", stale)
    with pytest.raises(AssertionError):
        test_replays_follow_the_inputs_and_the_rotary_tables()
