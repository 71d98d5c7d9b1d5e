"""What tests of the proof share: small nets under the official names, and what is said of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import recurx
from recurx import probing, proof, readings
from tests import lookalike

SCHEDULE = recurx.Schedule.trm(2, 2)
ROPE = recurx.rope_tables(10, 16)


def stack(token_mlp: bool = False, **fields: Any) -> Any:
    return lookalike.build(mlp_t=token_mlp, **fields).model.inner.L_level


def difference(net: Any, rope: bool = True) -> str:
    return proof.examine(net, "L", rope).difference or ""


def is_known(net: Any) -> bool:
    return readings.read(net, True) is not None


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_known", {})


def forward_hook(net: Any) -> None:
    net.layers[0].mlp.register_forward_hook(lambda *_: None)


def pruned(net: Any) -> None:
    nn.utils.prune.random_unstructured(net.layers[0].mlp.down_proj, "weight", amount=1)


def child(net: Any) -> None:
    net.layers[0].dropout = nn.Dropout(0.1)


def parameter(net: Any) -> None:
    net.layers[0].gain = nn.Parameter(torch.ones(1))


def instance_forward(net: Any) -> None:
    net.layers[0].mlp.forward = net.layers[0].mlp.forward
