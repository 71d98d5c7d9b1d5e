"""What people do to a model after they patched it: each edit changes what the model computes.

An edit takes the model and a generator of random numbers, and does the same to a twin under the
same seed.
"""

from __future__ import annotations

import ctypes
import math
import types
from collections.abc import Callable
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

Edit = Callable[[nn.Module, Random], None]
LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def _net(model: Any) -> Any:
    return model.model.inner.L_level


def _layer(model: Any, dice: Random) -> Any:
    return dice.choice(list(_net(model).layers))


def _linear(model: Any, dice: Random) -> tuple[Any, str, Any]:
    """(parent, name, the linear layer) of one of a layer's four."""
    path, _, name = dice.choice(LINEARS).rpartition(".")
    parent = _layer(model, dice).get_submodule(path)
    return parent, name, getattr(parent, name)


def _noise(like: Tensor, dice: Random) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(dice.randrange(1 << 30)))


class Adapted(nn.Module):
    """A low-rank adapter around a linear layer."""

    def __init__(self, base: nn.Module, dice: Random, weight: bool) -> None:
        super().__init__()
        self.base_layer = base
        out, inputs = base.weight.shape
        self.lora_A = nn.Parameter(_noise(torch.empty(4, inputs), dice) / math.sqrt(inputs))
        self.lora_B = nn.Parameter(_noise(torch.empty(out, 4), dice))
        self.shows_weight = weight

    @property
    def weight(self) -> Tensor:
        if not self.shows_weight:
            raise AttributeError("weight")
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.lora_A.T @ self.lora_B.T


def lora_around(model: Any, dice: Random) -> None:
    parent, name, linear = _linear(model, dice)
    setattr(parent, name, Adapted(linear, dice, weight=dice.random() < 0.5))


def lora_inside(model: Any, dice: Random) -> None:
    """Adapters set into the layer itself, its forward replaced in the instance."""
    _, _, linear = _linear(model, dice)
    out, inputs = linear.weight.shape
    linear.lora_A = nn.Parameter(_noise(torch.empty(4, inputs), dice) / math.sqrt(inputs))
    linear.lora_B = nn.Parameter(_noise(torch.empty(out, 4), dice))

    def forward(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + x @ self.lora_A.T @ self.lora_B.T

    linear.forward = types.MethodType(forward, linear)


class _Shrink(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


def parametrized(model: Any, dice: Random) -> None:
    parametrize.register_parametrization(_linear(model, dice)[2], "weight", _Shrink())


def old_weight_norm(model: Any, dice: Random) -> None:
    linear = _linear(model, dice)[2]
    nn.utils.weight_norm(linear)
    with torch.no_grad():
        linear.weight_g.mul_(0.5)


def pruned(model: Any, dice: Random) -> None:
    prune.l1_unstructured(_linear(model, dice)[2], "weight", amount=0.5)


def biased(model: Any, dice: Random) -> None:
    linear = _linear(model, dice)[2]
    linear.bias = nn.Parameter(_noise(torch.empty(linear.weight.shape[0]), dice))


def forward_hook(model: Any, dice: Random) -> None:
    module = dice.choice([_net(model), _layer(model, dice), _linear(model, dice)[2]])
    module.register_forward_hook(lambda m, args, out: 0.5 * out)


def forward_pre_hook(model: Any, dice: Random) -> None:
    linear = _linear(model, dice)[2]
    linear.register_forward_pre_hook(lambda m, args: (0.5 * args[0],))


def backward_hook(model: Any, dice: Random) -> None:
    linear = _linear(model, dice)[2]
    linear.register_full_backward_hook(lambda m, inputs, outputs: (0.5 * inputs[0],))


def backward_pre_hook(model: Any, dice: Random) -> None:
    linear = _linear(model, dice)[2]
    linear.register_full_backward_pre_hook(lambda m, outputs: (0.5 * outputs[0],))


def eps_changed(model: Any, dice: Random) -> None:
    _layer(model, dice).norm_eps = 0.5


def twisted(model: Any, dice: Random) -> None:
    layer = _layer(model, dice)
    twist = dice.choice(["gelu", "relu2", "pre-norm", "causal in code", "scaled residual"])
    for module in layer.modules():
        if hasattr(module, "twist"):
            module.twist = twist


def layer_removed(model: Any, dice: Random) -> None:
    net = _net(model)
    if len(net.layers) > 1:
        del net.layers[dice.randrange(len(net.layers))]


def layers_reversed(model: Any, dice: Random) -> None:
    net = _net(model)
    net.layers = nn.ModuleList(list(net.layers)[::-1])


def layer_shared(model: Any, dice: Random) -> None:
    net = _net(model)
    net.layers[0] = net.layers[-1]


def dropout_put_in(model: Any, dice: Random) -> None:
    _layer(model, dice).dropout = nn.Dropout(0.3)


class _Scaled(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 1.1 * self.inside(*args, **kwargs)


def layer_wrapped(model: Any, dice: Random) -> None:
    net = _net(model)
    number = dice.randrange(len(net.layers))
    net.layers[number] = _Scaled(net.layers[number])


def mlp_wrapped(model: Any, dice: Random) -> None:
    layer = _layer(model, dice)
    layer.mlp = _Scaled(layer.mlp)


def net_replaced(model: Any, dice: Random) -> None:
    net = _net(model)
    model.model.inner.L_level = _Scaled(net)


def forward_replaced(model: Any, dice: Random) -> None:
    layer = _layer(model, dice)
    own = type(layer).forward
    layer.forward = types.MethodType(lambda self, **kwargs: 0.7 * own(self, **kwargs), layer)


def class_changed(model: Any, dice: Random) -> None:
    """A subclass with another forward, as mix-ins are put in."""
    layer = _layer(model, dice)
    kind = type(layer)

    def forward(self: Any, cos_sin: Any, hidden_states: Tensor) -> Tensor:
        return 0.8 * kind.forward(self, cos_sin, hidden_states)

    layer.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def cycles_changed(model: Any, dice: Random) -> None:
    config = model.model.inner.config
    config.H_cycles, config.L_cycles = dice.choice([(1, 1), (1, 3), (3, 1), (2, 3)])


def frozen(model: Any, dice: Random) -> None:
    _linear(model, dice)[2].weight.requires_grad_(False)


# ---- writes that a version counter may not show ----------------------------------------------


def written_by_copy(model: Any, dice: Random) -> None:
    weight = _linear(model, dice)[2].weight
    with torch.no_grad():
        weight.mul_(0.5)


def written_by_data(model: Any, dice: Random) -> None:
    weight = _linear(model, dice)[2].weight
    weight.data.view(-1)[dice.randrange(weight.numel())] += 3.0


def written_by_numpy(model: Any, dice: Random) -> None:
    weight = _linear(model, dice)[2].weight
    weight.detach().numpy().reshape(-1)[dice.randrange(weight.numel())] += 3.0


def written_by_pointer(model: Any, dice: Random) -> None:
    weight = _linear(model, dice)[2].weight
    place = weight.data_ptr() + 4 * dice.randrange(weight.numel())
    ctypes.c_float.from_address(place).value += 3.0


def assigned(model: Any, dice: Random) -> None:
    state = {name: 0.8 * tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def parameter_replaced(model: Any, dice: Random) -> None:
    linear = _linear(model, dice)[2]
    linear.weight = nn.Parameter(0.5 * linear.weight.detach())


def storage_replaced(model: Any, dice: Random) -> None:
    linear = _linear(model, dice)[2]
    linear.weight.data = 0.5 * linear.weight.data.clone()


def transposed_storage(model: Any, dice: Random) -> None:
    """The same shape over other strides, and one element changed."""
    linear = _linear(model, dice)[2]
    linear.weight.data = linear.weight.data.t().contiguous().t()
    linear.weight.data[0, dice.randrange(linear.weight.shape[1])] += 3.0


EDITS: dict[str, Edit] = {
    edit.__name__: edit
    for edit in (
        lora_around, lora_inside, parametrized, old_weight_norm, pruned, biased, forward_hook,
        forward_pre_hook, backward_hook, backward_pre_hook, eps_changed, twisted, layer_removed,
        layers_reversed, layer_shared, dropout_put_in, layer_wrapped, mlp_wrapped, net_replaced,
        forward_replaced, class_changed, cycles_changed, frozen, written_by_copy, written_by_data,
        written_by_numpy, written_by_pointer, assigned, parameter_replaced, storage_replaced,
        transposed_storage,
    )
}  # fmt: skip
