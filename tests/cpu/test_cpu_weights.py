"""Weights of the compiled CPU engine: packed once, packed again when they change, of any layout."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from recurx import reference
from recurx.backends import cpu
from recurx.nets import Net
from tests.cpu.test_cpu_engine import ONE, run
from tests.factories import make_inputs, make_net, rope


def edit_copy(weight: Tensor) -> None:
    with torch.no_grad():
        weight.mul_(-1)


def edit_data(weight: Tensor) -> None:
    weight.data.mul_(-1)


def edit_pointer(weight: Tensor) -> None:
    weight.detach().numpy()[...] *= -1


def edit_storage(weight: Tensor) -> None:
    weight.data = -weight.data


def step_optimizer(weight: Tensor) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.5).step()
    weight.grad = None


@pytest.mark.parametrize("edit", [edit_copy, edit_data, edit_pointer, edit_storage, step_optimizer])
@pytest.mark.parametrize("index", range(4))
def test_a_changed_weight_is_packed_again(native: cpu.Cpu, edit, index: int) -> None:  # type: ignore[no-untyped-def]
    net = make_net(blocks=1)
    x, carry = make_inputs(ONE)
    before = run(native, ONE, {"L": net}, x, carry, rope())["z"]
    assert native.packed is not None
    packed = native.packed
    count = len(packed)
    run(native, ONE, {"L": net}, x, carry, rope())
    assert len(packed) == count, "an unchanged net was packed again"
    edit(net.weights[index])
    got = run(native, ONE, {"L": net}, x, carry, rope())["z"]
    expected = reference.run(ONE, {"L": net}, x, carry, rope())["z"]
    torch.testing.assert_close(got, expected.detach(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, got, rtol=1e-2, atol=1e-2)


def test_unchanged_weights_are_packed_once(native: cpu.Cpu, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    net = make_net()
    x, carry = make_inputs(ONE)
    run(native, ONE, {"L": net}, x, carry, rope())

    def refuse(*_: object) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr(cpu, "_pack", refuse)
    run(native, ONE, {"L": net}, x, carry, rope())
    fresh = Net(net.spec, net.weights)  # the cache knows tensors, not nets
    run(native, ONE, {"L": fresh}, x, carry, rope())
    with pytest.raises(AssertionError, match="packed again"):
        run(native, ONE, {"L": net}, x.bfloat16(), {"z": carry["z"].bfloat16()}, rope())


def test_inference_tensors_and_other_dtypes_as_weights(native: cpu.Cpu) -> None:
    x, carry = make_inputs(ONE)
    with torch.inference_mode():
        net = make_net()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        masters = Net(net.spec, [w.clone().to(dtype) for w in net.weights])
        expected = reference.run(ONE, {"L": masters}, x, carry, rope())["z"]
        got = run(native, ONE, {"L": masters}, x, carry, rope())["z"]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    expected = reference.run(ONE, {"L": net}, x, carry, rope())["z"]
    got = run(native, ONE, {"L": net}, x, carry, rope())["z"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_cache_is_weak_and_bounded(native: cpu.Cpu) -> None:
    packed = native.packed
    packed.clear()
    x, carry = make_inputs(ONE)
    nets = [make_net(seed=seed) for seed in range(cpu.MAX_PACKED + 3)]
    for net in nets:
        run(native, ONE, {"L": net}, x, carry, rope())
    assert len(packed) == cpu.MAX_PACKED
    del net, nets
    gc.collect()
    assert len(packed) == 0


def test_strided_weights(native: cpu.Cpu) -> None:
    net = make_net()
    strided = Net(net.spec, [w.t().contiguous().t() for w in net.weights])
    x, carry = make_inputs(ONE)
    expected = run(native, ONE, {"L": net}, x, carry, rope())["z"]
    assert torch.equal(run(native, ONE, {"L": strided}, x, carry, rope())["z"], expected)
