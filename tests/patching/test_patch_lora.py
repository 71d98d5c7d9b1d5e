"""Low-rank adapters and parametrizations: merged with gradient to the adapters, or said why not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import recurx
from recurx import UnsupportedModel
from recurx.lowrank import effective
from recurx.patching import handle
from tests import lookalike
from tests.patching.test_patch import inner_of, step


class Lora(nn.Module):
    """As peft's layer: attributes and arithmetic of its forward."""

    def __init__(self, base: nn.Module, dropout: float = 0.0, twist: str = "") -> None:
        super().__init__()
        outputs, inputs = base.weight.shape
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, outputs, bias=False)})
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(dropout)})
        self.scaling, self.twist = {"default": 0.5}, twist
        self.active_adapters, self.disable_adapters = ["default"], False

    @property
    def weight(self) -> Tensor:  # of the base, as peft says too
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        for name in [] if self.disable_adapters else self.active_adapters:
            low = self.lora_A[name](self.lora_dropout[name](x))
            low = torch.tanh(low) if self.twist == "tanh" else low
            scale = 0.6 if self.twist == "scale" else self.scaling[name]
            out = out + self.lora_B[name](low) * scale
        return out


class Sum(nn.Module):
    """W + B A as a parametrization of the weight; a twist of it changes at each use."""

    def __init__(self, weight: Tensor, drops: bool = False) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, weight.shape[1]) * 0.1)
        self.b = nn.Parameter(torch.randn(weight.shape[0], 4) * 0.1)
        self.drops = drops

    def forward(self, weight: Tensor) -> Tensor:
        low = nn.functional.dropout(self.a, 0.01, self.training and self.drops)
        return weight + self.b @ low


def with_adapters(model: nn.Module, kind: str = "lora", **how: Any) -> nn.Module:
    torch.manual_seed(3)
    for module in list(inner_of(model).L_level.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, lookalike.Dense) and kind == "lora":
                module._modules[name] = Lora(child, **how)
            elif isinstance(child, lookalike.Dense):
                parametrize.register_parametrization(child, "weight", Sum(child.weight, **how))
    return model


def close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        error = (got[name] - tensor).norm() / tensor.norm().clamp_min(1e-9)
        assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("kind", ["lora", "parametrization"])
@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("variant", ["trm", "hrm"])
def test_adapters_are_merged_and_get_their_gradient(kind: str, backend: str, variant: str) -> None:
    model = with_adapters(lookalike.build(variant), kind)
    want = step(model)
    assert any("lora_A" in name or ".a" in name for name in want)
    with recurx.patch(model, backend=backend) as patched:
        assert "1 patched" in str(patched.report)
        close(step(model), want)
        for parameter in model.parameters():  # what an optimiser does
            parameter.data.add_(
                0.03 * torch.sin(torch.arange(parameter.numel())).view_as(parameter)
            )
        got = step(model)
    close(got, step(model))


def test_adapters_that_come_after_the_patch_are_seen() -> None:
    model = lookalike.build()
    recurx.patch(model)
    with_adapters(model)
    got = step(model)
    plain = with_adapters(lookalike.build())
    close(got, step(plain))


def test_switched_off_adapters_are_off_and_the_base_may_train() -> None:
    model = with_adapters(lookalike.build())
    recurx.patch(model)
    for module in model.modules():
        if isinstance(module, Lora):
            module.disable_adapters = True
            module.base_layer.requires_grad_(True)
    plain = copy.deepcopy(model)
    close(step(model), step(plain))
    assert inner_of(model).L_level.layers[0].mlp.down_proj.base_layer.weight.grad.any()


@pytest.mark.parametrize(
    "kind,how,message",
    [
        ("lora", {"dropout": 0.1}, r"layers\.0\.self_attn\.qkv_proj` draws random numbers"),
        ("lora", {"dropout": 1e-3}, "draws random numbers"),
        ("lora", {"twist": "tanh"}, "is no linear layer of its merged weight"),
        ("lora", {"twist": "scale"}, "is no linear layer of its merged weight"),
        ("parametrization", {"drops": True}, "draws random numbers"),
    ],
)
def test_what_is_no_plain_sum_is_refused_and_runs_its_own_code(
    kind: str, how: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handle, "_told", set())  # what was said once is not said again
    model = with_adapters(lookalike.build(), kind, **how)
    state = torch.get_rng_state()
    with pytest.raises(UnsupportedModel, match=message):
        recurx.patch(model)
    assert torch.equal(torch.get_rng_state(), state)
    later = lookalike.build()
    recurx.patch(later)  # and adapters that come after the patch
    with_adapters(later, kind, **how)
    torch.manual_seed(5)
    want = step(model)
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match=message):
        close(step(later), want, 0.0)


def test_dropout_in_evaluation_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapters(lookalike.build(), dropout=0.3).eval()
    want = step(model)
    recurx.patch(model)
    close(step(model), want)
    monkeypatch.setattr(handle, "_told", set())
    with pytest.warns(UserWarning, match="draws random numbers"):
        step(model.train())


def test_weight_norm_is_a_weight_too() -> None:
    model = lookalike.build()
    torch.nn.utils.parametrizations.weight_norm(inner_of(model).L_level.layers[0].mlp.down_proj)
    want = step(model)
    recurx.patch(model)
    close(step(model), want)


def test_a_net_with_adapters_given_to_recurse() -> None:
    level = inner_of(with_adapters(lookalike.build())).L_level
    level.requires_grad_(True)
    x, z = torch.randn(2, 10, 32), torch.randn(2, 10, 32)
    tables = recurx.rope_tables(10, 16)
    schedule = recurx.Schedule.trm(1, 1)
    got = recurx.recurse(schedule, {"L": level}, x, {"z_H": z, "z_L": z}, cos_sin=tables)
    low = level(z, z + x, cos_sin=tables)
    torch.testing.assert_close(got["z_L"], low, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got["z_H"], level(z, low, cos_sin=tables), rtol=1e-4, atol=1e-4)


def test_the_merged_weight_is_the_formula() -> None:
    layer = with_adapters(lookalike.build()).model.inner.L_level.layers[0].mlp.down_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(effective(layer), layer.base_layer.weight + 0.5 * b @ a)
