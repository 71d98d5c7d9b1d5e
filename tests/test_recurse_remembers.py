"""What `recurse` remembers of a call may not hide what changed before the next one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import recurx
from recurx.errors import InvalidArgument
from recurx.models import TRMConfig
from recurx.models.layers import ReasoningNet
from recurx.verdicts import VERDICTS

TOKENS, WIDTH = 16, 64
SCHEDULE = recurx.Schedule.trm(2, 2)
ROPE = recurx.rope_tables(TOKENS, 32)


def made(kind=ReasoningNet) -> ReasoningNet:
    torch.manual_seed(0)
    return kind(TRMConfig.tiny(vocab_size=11, seq_len=TOKENS), num_layers=1)


def run(net, backend="cpu", rope=ROPE, tokens=TOKENS, **more) -> torch.Tensor:
    torch.manual_seed(1)
    x, z_H, z_L = torch.randn(3, 2, tokens, WIDTH)
    carry = {"z_H": z_H, "z_L": z_L}
    with torch.no_grad():
        out = recurx.recurse(
            SCHEDULE, {"L": net}, x, carry, backend=backend, cos_sin=rope, **more
        )  # fmt: skip
    return out["z_H"]


def assert_as_plain(got: torch.Tensor, net, **arguments) -> None:
    torch.testing.assert_close(got, run(net, "eager", **arguments), rtol=1e-3, atol=1e-4)


def heads(net, number) -> None:
    attention = net.layers[0].self_attn
    attention.num_heads = attention.num_key_value_heads = number


@pytest.mark.parametrize("number", [2.0, 0, -2, 3, True])
@pytest.mark.parametrize("backend", ["cpu", "auto", "eager"])
def test_impossible_heads_are_refused_and_spoil_nothing(native, backend, number) -> None:
    bad, good = made(), made()
    heads(bad, number)
    with pytest.raises(InvalidArgument, match="num_heads"):
        run(bad, backend)
    for _ in range(2):
        assert_as_plain(run(good, backend), made())


@pytest.mark.parametrize("size", ["hidden", "inner", "num_heads"])
def test_a_block_has_sizes_from_one_on(size) -> None:
    block = recurx.BlockSpec("attention", 64, 128, num_heads=2)
    with pytest.raises(InvalidArgument, match=size):
        dataclasses.replace(block, **{size: 0})


def buffer(layer, value) -> None:
    if hasattr(layer, "norm_eps"):
        del layer.norm_eps
    layer.register_buffer("norm_eps", torch.tensor(value))


def in_place(layer, value) -> None:
    if isinstance(layer.norm_eps, torch.Tensor):
        layer.norm_eps.fill_(value)
    else:
        layer.norm_eps = torch.tensor(value)


def plainly(layer, value) -> None:
    layer.norm_eps = value


@pytest.mark.parametrize("set_eps", [buffer, in_place, plainly])
def test_an_eps_of_any_kind_is_seen_to_change(native, set_eps) -> None:
    net, wanted = made(), made()
    set_eps(net.layers[0], 1e-5)
    for _ in range(2):
        assert_as_plain(run(net), made())
    set_eps(net.layers[0], 0.5)
    wanted.layers[0].norm_eps = 0.5
    assert_as_plain(run(net), wanted)


def test_an_attribute_that_hides_a_module_is_seen(native) -> None:
    net, other = made(), made()
    run(net)
    torch.nn.init.normal_(other.layers[0].mlp.down_proj.weight)
    net.layers[0].__dict__["mlp"] = other.layers[0].mlp
    assert_as_plain(run(net), other)


def test_a_module_without_a_hash_is_read_anew(native) -> None:
    class Compared(ReasoningNet):
        def __eq__(self, other):
            return self is other

    net = made(Compared)
    for _ in range(2):
        assert_as_plain(run(net), made())


@pytest.mark.parametrize("kind", ["negated", "zero"])
@pytest.mark.parametrize("place", ["tables", "weight"])
def test_lazy_tensors_are_more_than_their_memory(native, kind, place) -> None:
    def lazy(tensor: torch.Tensor) -> torch.Tensor:
        if kind == "zero":
            return torch._efficientzerotensor(tensor.shape)
        return torch._neg_view(tensor.clone())

    net, rope = made(), ROPE
    run(net)  # remembered with ordinary ones
    if place == "tables":
        rope = ROPE[0], lazy(ROPE[1])
    else:
        down = net.layers[0].mlp.down_proj
        down.weight = torch.nn.Parameter(lazy(down.weight.detach()))
    assert_as_plain(run(net, rope=rope), net, rope=rope)


@pytest.mark.parametrize(
    "wrong, name",
    [
        ({"stop_after": 2.0}, "stop_after"),
        ({"rope": ROPE[:1]}, "cos_sin"),
        ({"rope": (ROPE[0], None)}, "cos_sin"),
        ({"backend": []}, "backend"),
        ({"save": []}, "save"),
    ],
)
def test_a_wrong_argument_is_refused_after_a_right_one(native, wrong, name) -> None:
    run(made(), stop_after=2)
    with pytest.raises(InvalidArgument, match=name):
        run(made(), **wrong)


def test_no_tokens_at_all(native) -> None:
    assert run(made(), "auto", rope=None, tokens=0).shape == (2, 0, WIDTH)
    with pytest.raises(recurx.BackendUnavailable, match="T=0"):
        run(made(), "cpu", rope=None, tokens=0)
    model = recurx.models.TRM(TRMConfig.tiny(11, TOKENS))
    none = dataclasses.replace(recurx.models.problem_of_model(model), tokens=0)
    assert "T=0" in recurx.explain(none)
    assert "T=0" in str(recurx.cost(none))


@pytest.mark.parametrize(
    "damage",
    [
        {"calls": float("inf")},
        {"calls": float("nan")},
        {"calls": None},
        {"calls": "many"},
        {"seconds": {"cpu": 10**400}},
        {"seconds": {"cpu": -1.0}},
        {"seconds": {"eager": 1.0}},  # none of the one that was chosen
        {"seconds": 3},
        {"chosen": 3},
    ],
    ids=str,
)
def test_a_stored_verdict_that_is_none_is_left_out(monkeypatch, damage) -> None:
    monkeypatch.setattr(VERDICTS, "_pinned", {})
    sound = {"chosen": "cpu", "seconds": {"cpu": 1.0}, "calls": 3}
    VERDICTS.pin({"sound": sound, "damaged": {**sound, **damage}})
    assert set(VERDICTS._pinned) == {"sound"}
