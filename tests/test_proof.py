"""A net runs fused only where its structure proves it: each difference is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from recurx import survey
from tests.proving import (
    child,
    difference,
    forward_hook,
    instance_forward,
    is_known,
    parameter,
    pruned,
    stack,
)
from tests.proving import nothing_known as nothing_known


def pre_hook(net: Any) -> None:
    net.layers[0].mlp.register_forward_pre_hook(lambda *_: None)


def backward_hook(net: Any) -> None:
    net.layers[0].mlp.register_full_backward_hook(lambda *_: None)


def backward_pre_hook(net: Any) -> None:
    net.layers[0].mlp.register_full_backward_pre_hook(lambda *_: None)


def old_weight_norm(net: Any) -> None:
    nn.utils.weight_norm(net.layers[0].mlp.down_proj)


def buffer(net: Any) -> None:
    net.layers[0].self_attn.register_buffer("mask", torch.ones(1))


def tensor(net: Any) -> None:
    net.layers[0].mlp.mask = torch.ones(1)


def list_of_modules(net: Any) -> None:
    class Layers(nn.ModuleList):
        pass

    net.layers = Layers(net.layers)


def missing(net: Any) -> None:
    net.layers[0].mlp.down_proj.weight = None


def convolution(net: Any) -> None:
    net.layers[0].mlp.dwconv = nn.Conv1d(48, 48, 2, padding=1, groups=48, bias=False)


def half_convolution(net: Any) -> None:
    net.layers[0].mlp.dwconv = nn.Conv1d(48, 48, 2, padding=1, groups=48).half()


def other_eps(net: Any) -> None:
    net.layers[0].norm1, net.layers[0].norm2 = nn.RMSNorm(32, 1e-5), nn.RMSNorm(32, 1e-6)


def weight_of_one_norm(net: Any) -> None:
    net.layers[0].norm1 = nn.RMSNorm(32, 1e-5)


def replaced_linear(net: Any) -> None:
    net.layers[0].mlp.down_proj = nn.Identity()


STRUCTURES = {
    forward_hook: "layers.0.mlp` has hooks",
    pre_hook: "layers.0.mlp` has hooks",
    backward_hook: "layers.0.mlp` has hooks",
    backward_pre_hook: "layers.0.mlp` has hooks",
    old_weight_norm: "layers.0.mlp.down_proj` has a parameter `weight_g`",
    pruned: "layers.0.mlp.down_proj` has a parameter `weight_orig`",
    child: "layers.0` has a child `dropout` (Dropout)",
    parameter: "layers.0` has a parameter `gain`",
    buffer: "layers.0.self_attn` has a buffer `mask`",
    tensor: "layers.0.mlp` holds a Tensor `mask`",
    list_of_modules: "layers` is a Layers",
    instance_forward: "layers.0.mlp` has a `forward` of its own",
    missing: "layers.0.mlp.down_proj` has no plain parameter `weight`",
    convolution: "layers.0.mlp.dwconv` has no plain parameter `bias`",
    half_convolution: "layers.0` cannot be read: KeyError: torch.float16",
    other_eps: "layers.0` has norms of different eps: [1e-06, 1e-05]",
    weight_of_one_norm: "layers.0` has weights apart from its others: {'norm2'}",
    replaced_linear: "layers.0.mlp.down_proj` has no plain parameter `weight`",
}


@pytest.mark.parametrize("change", STRUCTURES, ids=lambda change: change.__name__)
def test_a_structure_that_differs_is_refused_by_name(change: Any) -> None:
    net = stack()
    assert difference(net) == ""
    change(net)
    assert not is_known(net), "the guard sees it"
    assert f"`L.{STRUCTURES[change]}" in difference(net)


@pytest.mark.parametrize("change", STRUCTURES, ids=lambda change: change.__name__)
def test_each_structure_needs_its_check(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: without the survey's word the structure alone stops none of them."""
    net = stack()
    change(net)
    monkeypatch.setattr(survey.Survey, "differs", lambda *_: None)
    said = difference(net)
    assert STRUCTURES[change] not in said


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_for_all_modules_count(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = stack()
    assert difference(net) == "" and is_known(net)
    name = f"register_module_{kind}_hook"
    handle = getattr(torch.nn.modules.module, name)(lambda *_: None)
    try:
        assert not is_known(net)
        assert "global module hooks" in difference(net)
        monkeypatch.setattr(survey, "_GLOBAL_HOOKS", ())
        assert difference(net) == ""
    finally:
        handle.remove()
    with FlopCounterMode(display=False):
        assert survey.foreign_hooks() is False  # these only take notes
