"""Calling the code of a module that recurx reads as a net: stacks and layers of each code base."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from recurx.errors import UnsupportedModel
from recurx.nets import is_block_stack, layers_of
from recurx.operands import CosSin


class OwnForward:
    """The forward of a module that is not proved, as a net `h -> h` for PyTorch."""

    def __init__(self, module: Any, difference: str, cos_sin: CosSin | None) -> None:
        self.module, self.difference, self.cos_sin = module, difference, cos_sin

    def __call__(self, h: Tensor) -> Tensor:
        return call_own(self.module, h, None, self.cos_sin)


def style_of(module: Any) -> str | None:
    """How a stack is called: "layers" in turn, "alone" with h, or "injected" with a second sum."""
    forward = getattr(type(module), "forward", nn.Module.forward)
    if forward is nn.Module.forward:
        return "layers"
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind < p.VAR_POSITIONAL]
    needed = [name for name in needed if name != "cos_sin"]
    if len(needed) == 1:
        return "alone"
    return "injected" if needed[1:] in ([name] for name in _INJECTED) else None


_INJECTED = ("input_injection", "injection")


def call_own(module: Any, h: Tensor, injected: Tensor | None, cos_sin: Any) -> Tensor:
    """N(h + injected) by the module's own code."""
    style = style_of(module)
    if style == "layers":
        h = h if injected is None else h + injected
        for layer in layers_of(module):
            h = call_layer(layer, h, cos_sin)
        return h
    parameters = inspect.signature(type(module).forward).parameters
    takes = "cos_sin" in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    given: dict[str, Any] = {"cos_sin": _their_tables(module, cos_sin)} if takes else {}
    name = next((name for name in _INJECTED if name in parameters), None)
    if style == "alone" and injected is not None and name is None:
        h = h + injected
    elif name and (injected is not None or style == "injected"):
        given[name] = torch.zeros_like(h) if injected is None else injected
    return module(h, **given)


def call_layer(layer: Any, h: Tensor, cos_sin: Any) -> Tensor:
    """One layer by its own code: of (cos_sin, hidden_states) as official ones, or of (x, cos_sin).

    priml's give what they keep of keys and values too, where they are asked to.
    """
    if "hidden_states" in inspect.signature(type(layer).forward).parameters:
        return layer(cos_sin=cos_sin, hidden_states=h)
    return layer(h, cos_sin=_halves(cos_sin))


def _their_tables(module: Any, cos_sin: Any) -> Any:
    layers = layers_of(module) or [module]
    named = "hidden_states" in inspect.signature(type(layers[0]).forward).parameters
    return cos_sin if named or not is_block_stack(module) else _halves(cos_sin)


def _halves(cos_sin: Any) -> Any:
    """Tables of the pairs alone, [T, 1, head_dim / 2], as SIC and priml take them."""
    if cos_sin is None:
        return None
    halves = [table.chunk(2, -1) for table in cos_sin]
    if not all(torch.equal(*both) for both in halves):
        raise UnsupportedModel(
            "recurx.recurse: cos_sin has other values in its second half than in its first, which "
            "this net's own code cannot take"
        )
    return tuple(both[0].unsqueeze(-2) for both in halves)
