"""The guard of a proof: a net is known only for as long as nobody edits it."""

from __future__ import annotations

import copy
import gc
import weakref
from random import Random
from typing import Any

import pytest
import torch
from torch import nn

from recurx import readings
from tests import lookalike
from tests.hostile import models as twisted
from tests.hostile.edits import EDITS, LINEARS
from tests.proving import difference, is_known, stack
from tests.proving import nothing_known as nothing_known

UNSEEN = {
    "cycles_changed",
    "frozen",
    "written_by_copy",
    "written_by_data",
    "written_by_numpy",
    "written_by_pointer",
    "assigned",
    "parameter_replaced",
    "storage_replaced",
    "transposed_storage",
    "net_replaced",
}  # fmt: skip  the weights are read at every call; of another net the adapter knows


def helper_replaced(model: Any, dice: Random) -> None:
    lookalike.normed = lambda x, eps: x


def class_forward(model: Any, dice: Random) -> None:
    lookalike.Gated.forward = lambda self, x: x


def class_setting(model: Any, dice: Random) -> None:
    lookalike.Mixer.causal = True


@pytest.mark.parametrize("edit", [*EDITS.values(), helper_replaced, class_forward, class_setting])
def test_the_guard_sees_every_edit_of_the_code(edit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((lookalike, "normed"), (lookalike.Gated, "forward")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(lookalike.Mixer, "causal", False, raising=False)
    model = twisted.model() if edit.__name__ in EDITS else lookalike.build()
    net = model.model.inner.L_level
    assert difference(net) == "" and is_known(net)
    edit(model, Random(3))
    assert is_known(net) == (edit.__name__ in UNSEEN)


@pytest.mark.parametrize(
    "part,edit",
    [
        ("_hooks", EDITS["forward_hook"]), ("_lengths", EDITS["lora_inside"]),
        ("_flat", EDITS["eps_changed"]), ("_types", EDITS["class_changed"]),
        ("_globals", helper_replaced), ("_absent", EDITS["biased"]),
    ],
)  # fmt: skip
def test_each_part_of_the_guard_bites(
    part: str, edit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookalike, "normed", lookalike.normed)
    model = lookalike.build()
    if part == "_absent":  # nn.Linear keeps None among its parameters
        for layer in model.model.inner.L_level.layers:
            for where in LINEARS:
                old = layer.get_submodule(where)
                layer.set_submodule(where, nn.Linear(*old.weight.shape[::-1], bias=False))
    net = model.model.inner.L_level
    assert difference(net) == ""
    edit(model, Random(3))
    assert not is_known(net)
    reading = readings.remembered(net)
    assert reading is not None
    if part == "_flat":
        monkeypatch.setattr(readings, "is_", lambda a, b: True)
    elif part == "_lengths":
        reading._lengths = list(map(len, reading._counted))
    elif part == "_types":
        reading._types = [type(module) for module in reading._modules]
    else:
        setattr(reading, part, [])
    if part == "_lengths":
        monkeypatch.setattr(readings, "is_", lambda a, b: True)  # a new attribute shows in both
    assert is_known(net), "taken out, it is missed"


def test_modes_and_weights_trip_no_guard() -> None:
    net = stack()
    assert difference(net) == ""
    net.eval()
    assert difference(net) == ""  # once in each mode
    for training in (True, False, True):
        net.train(training)
        assert is_known(net)
    with torch.no_grad():
        net.layers[0].mlp.down_proj.weight.zero_()
    net.requires_grad_(False)
    assert is_known(net)
    copied = copy.deepcopy(net)
    assert not is_known(copied) and difference(copied) == "" and is_known(copied)


def test_nothing_keeps_a_module_alive() -> None:
    net = stack()
    assert difference(net) == "" and is_known(net)
    key, gone = id(net), weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None and key not in readings._readings
